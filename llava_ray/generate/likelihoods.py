"""Log-likelihoods of whole answers, to rank the options of a multiple-choice question.

The answers are tokens and labels as in training, so all supervised tokens count: the answer's words and its end token.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_ray.chat.conversation import IGNORE_INDEX
from llava_ray.chat.tokens import TokenizedConversation
from llava_ray.generate.decoding import read_prompts
from llava_ray.generate.sampling import not_finite_error
from llava_ray.images.anyres import Size
from llava_ray.model.assembly import LlavaParts


@torch.inference_mode()
def compute_log_likelihoods(
    parts: LlavaParts,
    answered: Sequence[Sequence[TokenizedConversation]],
    pixels: Sequence[Float[Tensor, "_ 3 h w"] | None],
    image_sizes: Sequence[Sequence[Size]] | None = None,
) -> list[list[tuple[float, int]]]:
    """Compute the natural log-likelihood and number of tokens of the answer of each question's conversations.

    The conversations of a question differ only in the last answer. Their common prefix is read once, with its images
    (``pixels`` and ``image_sizes`` as ``decoding.generate_batch`` takes them). Raises RecordError, and ModelError for
    logits that are not finite too.
    """
    prompts = [shared_prompt(some) for some in answered]
    rows = read_prompts(parts, prompts, pixels, image_sizes)
    device = rows.logits.device
    owners = torch.tensor([number for number, some in enumerate(answered) for _ in some], device=device)
    starts = [len(prompt) for prompt, some in zip(prompts, answered, strict=True) for _ in some]
    whole = [one for some in answered for one in some]
    ids = _padded([one.input_ids[start:] for one, start in zip(whole, starts, strict=True)], IGNORE_INDEX, device)
    labels = _padded([one.labels[start:] for one, start in zip(whole, starts, strict=True)], IGNORE_INDEX, device)
    is_there, tokens = ids != IGNORE_INDEX, ids.clamp(min=0)
    rows.cache.batch_select_indices(owners)
    read = rows.mask[owners]
    after = parts.llava.language_model(
        inputs_embeds=parts.llava.language_model.get_input_embeddings()(tokens),
        attention_mask=torch.cat([read, is_there], dim=1),
        position_ids=read.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=device),
        past_key_values=rows.cache,
        use_cache=True,
    ).logits[:, :-1]
    log_probs = torch.cat([rows.logits[owners, None], after.float()], dim=1).log_softmax(-1)
    is_supervised = labels != IGNORE_INDEX
    likelihoods = log_probs.gather(-1, tokens[..., None])[..., 0].masked_fill(~is_supervised, 0.0).double().sum(1)
    for answer, (owner, finite) in enumerate(zip(owners.tolist(), likelihoods.isfinite().tolist(), strict=True)):
        if not finite:
            raise not_finite_error(f"answer {answer + 1} of {len(whole)}, to question {owner + 1} of {len(answered)},")
    pairs = zip(likelihoods.tolist(), is_supervised.sum(1).tolist(), strict=True)
    return [[next(pairs) for _ in some] for some in answered]


def shared_prompt(conversations: Sequence[TokenizedConversation]) -> list[int]:
    """Return the longest common prefix of ids, up to the first supervised one."""
    columns = zip(*(one.input_ids[: _first_supervised(one)] for one in conversations), strict=False)
    return [ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, columns)]


def _first_supervised(conversation: TokenizedConversation) -> int:
    """Return the position of the first supervised token."""
    return next(place for place, label in enumerate(conversation.labels) if label != IGNORE_INDEX)


def _padded(rows: Sequence[Sequence[int]], value: int, device: torch.device) -> Tensor:
    """Return rows (n, longest), padded on the right."""
    stacked = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    return stacked.to(device)
