"""Several sampled answers to each prompt, whose images and prompt are computed once.

Each answer has its own seed and draws one number a token, so that it depends on its prompt and seed and not on what
else is in the batch, but for the rounding of batched arithmetic.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from llava_ray.generate.decoding import continue_rows, default_stops, has_ended, read_prompts
from llava_ray.generate.engine import Sampling
from llava_ray.generate.sampling import check_sampling, sample_tokens
from llava_ray.images.anyres import Size
from llava_ray.model.assembly import LlavaParts

NUM_NOISE_STEPS = 1000


@torch.inference_mode()
def sample_batch(
    parts: LlavaParts,
    prompts: Sequence[Sequence[int]],
    pixels: Sequence[Float[Tensor, "_ 3 h w"] | None],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    image_sizes: Sequence[Sequence[Size]] | None = None,
) -> list[list[tuple[list[int], bool]]]:
    """Sample an answer to each prompt for each of its seeds; return token ids without the end token, and if it ended.

    Raises RecordError for impossible sampling settings, and what ``generate_batch`` raises.
    """
    check_sampling(sampling)
    if not prompts:
        return []
    stops = default_stops(parts)
    rows = read_prompts(parts, prompts, pixels, image_sizes)
    rows.repeat([len(some) for some in seeds])
    draws = [random.Random(seed) for some in seeds for seed in some]

    def pick(logits: Tensor, indices: Sequence[int]) -> list[int]:
        numbers = [draws[index].random() for index in indices]
        return sample_tokens(logits, [sampling] * len(indices), numbers)

    answers = iter(continue_rows(parts, rows, pick, sampling.max_tokens, stops))
    found = []
    for some in seeds:
        mine = [next(answers) for _ in some]
        ended = [has_ended(parts, answer, stops) for answer in mine]
        texts = [answer[:-1] if answer[-1] in stops.ids else answer for answer in mine]
        found.append(list(zip(texts, ended, strict=True)))
    return found


def add_diffusion_noise(pixels: Float[Tensor, "n 3 h w"], step: int, seed: int) -> Float[Tensor, "n 3 h w"]:
    """Noise normalised images by ``step`` of 1,000 steps of forward diffusion with a sigmoid schedule, as VCD does.

    x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, where a_t is the product of 1 - b_i up to t, and b_i rises along a sigmoid
    from 1e-5 to 5e-3 (Leng et al. 2023, "Mitigating Object Hallucinations … through Visual Contrastive Decoding"; POVID
    and mDPO make rejected images alike). The noise depends on the seed alone.
    """
    betas = torch.sigmoid(torch.linspace(-6, 6, NUM_NOISE_STEPS, dtype=torch.float64)) * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas).cumprod(0)[step - 1])
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(seed))
    return (kept**0.5 * pixels + (1 - kept) ** 0.5 * noise.to(pixels)).to(pixels)
