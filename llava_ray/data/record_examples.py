"""The examples of a record as it stands in a shard: of a conversation, or of a preference."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jinja2
import numpy as np

from llava_ray.chat.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX, Turn
from llava_ray.data.examples import Encoder, Example, unsupervised_error
from llava_ray.data.pair_lengths import PairLengths
from llava_ray.errors import RecordError, TemplateError
from llava_ray.images.anyres import Size
from llava_ray.reading import describe_error


def encode_record(
    encoder: Encoder, turns: Sequence[Turn], sizes: Sequence[Size], rejected: Sequence[Turn] = ()
) -> list[Example]:
    """Return a record's examples. Raises RecordError, also for a record that the template cannot render."""
    try:
        return [encode_pair(encoder, turns, rejected, sizes)] if rejected else encoder.encode(turns, sizes)
    except TemplateError as error:
        raise RecordError(str(error), reason="template") from error
    except jinja2.TemplateError as error:  # raised by the chat template itself
        message = f"the model's chat template refuses the messages: {describe_error(error)}"
        raise RecordError(message, reason="template") from error


def encode_row(encoder: Encoder, row: Mapping[str, Any]) -> list[Example]:
    """Return the examples of a record as it stands in a shard. Raises RecordError."""
    turns, rejected = ([Turn.from_row(turn) for turn in row.get(name) or ()] for name in ("turns", "rejected"))
    return encode_record(encoder, turns, list(zip(row["widths"], row["heights"], strict=True)), rejected)


def encode_pair(
    encoder: Encoder, turns: Sequence[Turn], rejected: Sequence[Turn], image_sizes: Sequence[Size]
) -> Example:
    """Return a preference as one example: ``turns`` end with the chosen answer, in whose place is the other.

    Neither side is ever truncated or split. Raises RecordError as ``Encoder.encode`` does, "equal_sides" where both
    have the same tokens, and "too_long" where they exceed model_max_length with the prompt they share.
    """
    encoder, spoken = encoder.for_record(turns)
    counts = [encoder.image_tokens.count(*size) for size in image_sizes]
    encoder.check_images(counts, image_sizes)
    asked = next((index for index, turn in enumerate(spoken) if turn.role == "gpt" and turn.supervised), None)
    if asked is None:
        raise unsupervised_error(spoken)
    shown = range(len(counts))
    better = encoder.example(spoken, shown, counts)
    worse = encoder.example([*spoken[:asked], *rejected], shown, counts)
    if not (better.num_supervised and worse.num_supervised):
        raise RecordError(
            "nothing to learn: an answer of the preference has no supervised token. Fix or remove the record",
            reason="nothing_to_learn",
        )
    if np.array_equal(better.input_ids, worse.input_ids):
        raise RecordError(
            "chosen and rejected have the same tokens once the template has rendered them (it drops what differs, such "
            "as spaces at an end): there is nothing to prefer. Remove it",
            reason="equal_sides",
        )
    shared = _shared_length(better, worse)
    lengths = PairLengths(shared, len(better.input_ids) - shared, len(worse.input_ids) - shared)
    pair = replace(
        better,
        input_ids=np.concatenate([better.input_ids, worse.input_ids[shared:]]),
        labels=np.concatenate([better.labels, worse.labels[shared:]]),
        pair=lengths,
    )
    if len(pair.input_ids) > encoder.model_max_length:
        prompt = f"{shared} of the prompt, {lengths.chosen} and {lengths.rejected} of the answers"
        raise encoder.too_long(len(pair.input_ids), f"of which {prompt} (a preference is never truncated)")
    return pair


def _shared_length(better: Example, worse: Example) -> int:
    """Return the tokens with which both sides begin, at most all but the last of the prompt. Raises RecordError."""
    first = min(int(np.flatnonzero(side.labels != IGNORE_INDEX)[0]) for side in (better, worse))
    most = max(first - 1, 0)
    differing = np.flatnonzero(better.input_ids[:most] != worse.input_ids[:most])
    shared = int(differing[0]) if len(differing) else most
    if not shared or any(np.any(side.input_ids[shared:] == IMAGE_TOKEN_INDEX) for side in (better, worse)):
        raise RecordError(
            "the two answers of a preference need a prompt whose text stands between its images and the answer; the "
            "template leaves none",
            reason="no_prompt",
        )
    return shared
