"""A tiny model, requests about it, and what transformers alone answers to each."""

import asyncio
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import fakes
import numpy as np
import torch
from PIL import Image

from llava_ray.chat.conversation import Turn
from llava_ray.config.lora import LoraConfig
from llava_ray.config.model import ModelConfig
from llava_ray.errors import ImageError, RecordError
from llava_ray.generate.builtin.builtin_engine import BuiltinEngine
from llava_ray.generate.engine import Engine, GenerationChunk, GenerationRequest, Sampling
from llava_ray.generate.prompts import PromptMaker
from llava_ray.generate.settings import EngineSettings
from llava_ray.generate.vision_cache import VisionCache
from llava_ray.model.assembly import LlavaParts, assemble, merge
from llava_ray.model.loading import load_pretrained_model
from llava_ray.model.lora.adapters import add_adapter
from llava_ray.model.saving import save_bundle

SHAPES = [(64, 48), (40, 70), (96, 20), (32, 32)]
SMALL_GAP = 1e-3  # between the two likeliest tokens' logits: rounding may decide
NEVER = Sampling(max_tokens=8, ignore_eos=True)


def make_parts(
    root: Path,
    kind: str = "llama",
    *,
    anyres: bool = False,
    version: str = "v1",
    **language: object,
) -> LlavaParts:
    """A random model of which a third of the tokens ends an answer, so that answers end at all lengths."""
    if not (root / kind).exists():  # parts that were read before may still be reading
        fakes.make_language_model(root / kind, kind, **language)  # type: ignore[arg-type]
    if not (root / "tower").exists():
        fakes.make_vision_tower(root / "tower")
    config = ModelConfig(
        model_name_or_path=str(root / kind),
        vision_tower=str(root / "tower"),
        version=version,
        **({"mm_patch_merge_type": "spatial_unpad"} if anyres else {}),
    )
    parts = assemble(config, "anyres" if anyres else "pad", seed=3)
    parts.llava.eval()
    return with_ends(parts)


def with_ends(parts: LlavaParts) -> LlavaParts:
    """Let more tokens than one end an answer."""
    parts.llava.language_model.generation_config.eos_token_id = [fakes.EOS, *range(285, 300)]
    return parts


def spoil(parts: LlavaParts, character: str) -> LlavaParts:
    """Make one character infinite to a model: what reads it has no finite logits, all else is as before."""
    [token] = parts.tokenizer(character, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        parts.llava.language_model.get_input_embeddings().weight[token] = torch.inf
    return parts


def write_adapter(
    folder: Path,
    parts: LlavaParts,
    *,
    seed: int,
    own_projector: bool = False,
    own_tower: bool = False,
    **lora: object,
) -> Path:
    """Write a bundle with an adapter, as after training, over a model that is of no more use afterwards."""
    settings = {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    add_adapter(parts.llava.language_model, LoraConfig.parsed(settings | lora), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    learns = [parameter for parameter in parts.llava.language_model.parameters() if parameter.requires_grad]
    learns += parts.llava.projector.parameters() if own_projector else []
    with torch.no_grad():
        for parameter in learns:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    tensors = None
    if own_tower:
        tower = parts.tower.backbone.state_dict()
        own = {
            f"vision_tower.{key}": tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in tower.items()
        }
        tensors = parts.llava.state_dict() | own
    save_bundle(folder, parts, tensors)
    return folder


def merged(folder: Path) -> LlavaParts:
    """The whole model of an adapter, for transformers alone."""
    return with_ends(merge(load_pretrained_model(folder)))


def make_image(seed: int) -> bytes:
    """An encoded image of one of several shapes."""
    buffer = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize(SHAPES[seed % len(SHAPES)]).save(buffer, "PNG")
    return buffer.getvalue()


def make_requests(count: int, *, seed: int = 0) -> list[GenerationRequest]:
    """Conversations and raw prompts of all lengths, with no, one and two images."""
    draw = random.Random(seed)
    requests = []
    for index in range(count):
        num_images = index % 3
        words = " ".join(draw.choices(["red", "blue", "circle", "is", "it", "Größe", "?"], k=draw.randint(1, 24)))
        text = "<image>\n" * num_images + words
        sampling = Sampling(max_tokens=draw.randint(1, 24))
        images = tuple(make_image(draw.randrange(12)) for _ in range(num_images))
        turns = (Turn("human", text),) if index % 4 else ()
        prompt = None if turns else text
        requests.append(GenerationRequest(f"r{index}", turns, prompt, images, sampling=sampling))
    return requests


def request(text: str = "is it red?", name: str = "r", *images: bytes, **sampling: object) -> GenerationRequest:
    """One question."""
    asked = (Turn("human", "<image>\n" * len(images) + text),)
    return GenerationRequest(name, asked, images=images, sampling=replace(NEVER, **sampling))  # type: ignore[arg-type]


# What every engine refuses, with which error and in which words.
WRONG: list[tuple[GenerationRequest, type[Exception], str]] = [
    (request("<image>", "r"), RecordError, "1 <image> markers but 0 images"),
    (request("what?", "r", b"no image"), ImageError, "image 1"),
    (request(temperature=float("nan")), RecordError, "temperature is nan"),
    (request(stop=("",)), RecordError, "stop is"),
    (GenerationRequest("r"), RecordError, "either turns or a prompt"),
    (GenerationRequest("r", (Turn("human", "a"), Turn("gpt", "b"))), RecordError, "human turn last"),
]


@dataclass
class Answered:
    """All chunks of one answer."""

    chunks: list[GenerationChunk] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.token_ids]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def finish_reason(self) -> str | None:
        assert all(chunk.finish_reason is None for chunk in self.chunks[:-1])
        return self.chunks[-1].finish_reason if self.chunks else None


async def ask(engine: Engine, asked: GenerationRequest, delay: float = 0.0) -> Answered:
    await asyncio.sleep(delay)
    answered = Answered()
    async for chunk in engine.generate(asked):
        answered.chunks.append(chunk)
    return answered


async def started(parts: LlavaParts, adapters: Mapping[str, Path] | None = None, **settings: object) -> BuiltinEngine:
    bounds = EngineSettings(**settings)  # type: ignore[arg-type]
    engine = BuiltinEngine(lambda: parts, name="tiny", settings=bounds, adapters=adapters)
    await engine.start()
    return engine


def answer_all(
    parts: LlavaParts,
    asked: Sequence[GenerationRequest],
    delays: Sequence[float] | None = None,
    adapters: Mapping[str, Path] | None = None,
    **settings: object,
) -> list[Answered]:
    """What an engine answers to requests that arrive after these delays; the model is given back."""

    async def run() -> list[Answered]:
        engine = await started(parts, adapters, **settings)
        try:
            waits = delays or [0.0] * len(asked)
            return await asyncio.gather(*(ask(engine, one, wait) for one, wait in zip(asked, waits, strict=True)))
        finally:
            await engine.stop()

    return asyncio.run(run())


@dataclass(frozen=True)
class Expected:
    """What ``generate`` writes at batch size 1, and how far apart its two likeliest tokens were."""

    ids: list[int]
    gaps: list[float]


@torch.no_grad()
def by_transformers(parts: LlavaParts, asked: GenerationRequest) -> Expected:
    prompt = PromptMaker(parts, VisionCache(0), 2048).make(asked)
    views = [image.views for image in prompt.images if image.views is not None]
    ids = torch.tensor([prompt.ids])
    written = parts.llava.language_model.generate(
        inputs_embeds=parts.llava.embed(
            ids, parts.tower(torch.cat(views)) if views else None, [image.size for image in prompt.images]
        ),
        attention_mask=torch.ones_like(ids),
        max_new_tokens=asked.sampling.max_tokens,
        do_sample=False,
        eos_token_id=sorted(prompt.stops.ids) or None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(written.logits).float().topk(2).values
    tokens = written.sequences[0].tolist()
    return Expected(tokens[:-1] if tokens[-1] in prompt.stops.ids else tokens, (best[:, 0] - best[:, 1]).tolist())


def count_differing(answers: Sequence[Answered], expected: Sequence[Expected]) -> int:
    """Count the answers that leave the expected one, which they may only where rounding decides."""
    differing = 0
    for answer, alone in zip(answers, expected, strict=True):
        if answer.ids != alone.ids:
            pairs = enumerate(zip(answer.ids, alone.ids, strict=False))
            place = next(
                (place for place, (mine, theirs) in pairs if mine != theirs), min(len(answer.ids), len(alone.ids))
            )
            assert alone.gaps[place] < SMALL_GAP, (place, alone.gaps[place], answer.ids, alone.ids)
            differing += 1
    return differing
