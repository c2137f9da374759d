"""Checks that a language model has an embedding row for every token of its tokenizer, from files alone. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_ray.chat.conversation import IMAGE_TOKEN
from llava_ray.chat.tokenizer import MAX_TOKENIZER_BYTES
from llava_ray.errors import ModelError
from llava_ray.model.formats.layout import EMBED_TOKENS, Layout
from llava_ray.model.tensors.tensor_files import StoredTensor, read_json_object
from llava_ray.reading import is_file, short_repr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_ray.model.formats.sources import Source

_TABLES = (EMBED_TOKENS, "wte.weight", "word_embeddings.weight", "embed_in.weight")


class _NumberedToken(NamedTuple):
    """A token with its id, and the file that lists it."""

    number: int
    text: str
    file: str


def check_rows(tokenizer: "PreTrainedTokenizerBase", new_ids: Sequence[int], language: "Source", folder: Path) -> None:
    """Raise ModelError if a tokenizer has tokens, beside ``new_ids``, beyond the language model's embeddings.

    The padding token may be one, as in many published tokenizers: padding is masked and never looked up.
    """
    rows = _find_rows(language.tensors, language.config)
    if rows is None or new_ids:  # with new tokens, every token without a row gets one
        return
    beyond = {number: text for text, number in tokenizer.get_vocab().items() if number >= rows}
    beyond.pop(tokenizer.pad_token_id, None)
    if beyond:
        _check_token_in_rows(
            _NumberedToken(min(beyond), beyond[min(beyond)], str(folder)), len(beyond), rows, language.name
        )


def check_layout_rows(layout: Layout) -> None:
    """Raise ModelError for the same fault of a model folder, as far as its files show it."""
    if not layout.has_language_model:
        return
    rows = _find_rows(layout.part("language_model"), layout.language_config or {})
    if rows is None:
        return
    check_table(layout.part("language_model"), layout.language_config or {}, str(layout.folder))
    padding = _find_padding(layout.folder)
    listed = (token for token in _listed_tokens(layout.folder) if token.text != padding)
    beyond = {token.number: token for token in listed if token.number >= rows}
    if beyond:
        _check_token_in_rows(beyond[min(beyond)], len(beyond), rows, str(layout.folder))


def check_table(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError if a language model's vocab_size differs from the rows of its embeddings."""
    rows, size = _find_rows(tensors, {}), config.get("vocab_size")
    if rows is not None and type(size) is int and rows != size:
        raise ModelError(
            f"{where}: vocab_size is {size:,} in its config.json, but its embeddings have {rows:,} rows. These are not "
            "one model's files; if the weights are right, set vocab_size to that."
        )


def image_token_note(config: Mapping[str, Any], token: int | None) -> str | None:
    """Return a note if a hub folder's config.json has another image token than its tokenizer; None otherwise."""
    index = config.get("image_token_index", config.get("image_token_id"))
    if index is None or token is None or index == token:
        return None
    return (
        f"image_token_index is {short_repr(index)} in its config.json, but its tokenizer's {IMAGE_TOKEN} is "
        f"{token}, which "
        "is used here; other programs will find no place for images"
    )


def find_image_token(folder: Path) -> int | None:
    """Find the id of ``<image>`` in a folder's tokenizer files; None where they have none."""
    return next((token.number for token in _listed_tokens(folder) if token.text == IMAGE_TOKEN), None)


def _check_token_in_rows(first: _NumberedToken, number: int, rows: int, model: str) -> None:
    """Raise ModelError that names the token without a row, and the remedy."""
    raise ModelError(
        f"the tokenizer in {first.file} has {number} tokens without a row in the embeddings of {model}, which have "
        f"{rows:,}: the first is {short_repr(first.text)} with the id {first.number}. Take these tokens out of "
        "tokenizer.json, tokenizer_config.json and added_tokens.json, or copy the weights that were saved with this "
        "tokenizer."
    )


def _find_rows(tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> int | None:
    """Return the number of embedding rows of a language model; None where it is unknown."""
    for name, tensor in tensors.items():
        if name.endswith(_TABLES) and len(tensor.shape) == 2:
            return tensor.shape[0]
    size = config.get("vocab_size")
    return size if type(size) is int else None


def _find_padding(folder: Path) -> str | None:
    """Return the padding token that a tokenizer's settings name."""
    settings = folder / "tokenizer_config.json"
    token = read_json_object(settings).get("pad_token") if is_file(settings) else None
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _listed_tokens(folder: Path) -> Iterator[_NumberedToken]:
    """Yield the tokens that a folder's tokenizer files list; pieces of a SentencePiece file without their text."""
    if is_file(folder / "tokenizer.json"):
        yield from _of_tokenizer_json(folder / "tokenizer.json")
    for name in ("vocab.json", "added_tokens.json"):
        if is_file(folder / name):
            yield from _of_pairs(read_json_object(folder / name), folder / name)
    settings = folder / "tokenizer_config.json"
    if is_file(settings):
        decoder = read_json_object(settings).get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, dict) else ():
            if str(number).isdecimal() and len(number) < 16:
                text = token.get("content") if isinstance(token, dict) else token
                yield _NumberedToken(int(number), str(text), str(settings))


def _of_tokenizer_json(file: Path) -> Iterator[_NumberedToken]:
    values = read_json_object(file, MAX_TOKENIZER_BYTES)
    model, added = values.get("model"), values.get("added_tokens")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from _of_pairs(vocab, file)
    elif isinstance(vocab, list):  # Unigram: pieces with their scores, ids in order
        pieces = (str(piece[0]) if isinstance(piece, list) and piece else "" for piece in vocab)
        yield from (_NumberedToken(number, piece, str(file)) for number, piece in enumerate(pieces))
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and type(token.get("id")) is int:
            yield _NumberedToken(token["id"], str(token.get("content")), str(file))


def _of_pairs(values: Mapping[str, Any], file: Path) -> Iterator[_NumberedToken]:
    return (_NumberedToken(number, text, str(file)) for text, number in values.items() if type(number) is int)
