"""A model's geometry: what decides which numbers reach the language model for an image, and through which modules.

A setting is asked for in a recipe (``GeometrySettings``, some of it left open) and resolved when the model's folders
have been read (``ModelGeometry``). A bundle's llava.json holds the resolved one. All else takes the names from here:
no other module lists them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from llava_ray.config.literals import read_literal

PROJECTOR = "mlp([1-9][0-9]?)x_gelu"
Pixels = Annotated[int, Field(gt=0, le=2**15)]
PositiveCount = Annotated[int, Field(gt=0, le=2**24)]
_Layer = Annotated[int, Field(ge=-1025, le=1024)]
_Feature = Literal["patch", "cls_patch"]


class AddableSettings(BaseModel):
    """Settings that recipe and bundle say in the same words, each with a default that a model may go on from.

    A new setting goes here. It is then in recipes, flags and llava.json, is told by ``inspect`` and compared wherever a
    projector meets a config, and layouts of other programs refuse it; what remains is the code that honours it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] = "flat"
    """How the views of an anyres image are joined: one after the other, line by line through all of them, or the latter
    without the padding and with a learned vector at the end of each line (LLaVA-1.6)."""
    mm_use_im_start_end: bool = False
    """Put <im_start> and <im_end> around each image; new tokens begin as the mean of the old ones."""
    mm_use_im_patch_token: bool = False
    """Add <im_patch> to the vocabulary, as LLaVA's first models did; no text uses it."""


class _AskedSettings(BaseModel):
    """What a recipe says in its own words."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mm_projector_type: str = "mlp2x_gelu"
    """"linear", "mlpNx_gelu" or "identity"."""
    mm_vision_select_layer: int | tuple[int, ...] = -2
    """Index into the tower's hidden states; -2 is the output of the last block but one. Several are laid side by side
    (on channels), in the order given."""
    mm_vision_select_feature: _Feature = "patch"
    """"patch" drops the tower's prefix tokens (class and register tokens), "cls_patch" keeps them."""
    image_grid_pinpoints: tuple[tuple[Pixels, Pixels], ...] | None = None
    """Canvases (width, height) of anyres, in pixels; default: the bundle's, or LLaVA-1.6's for the tower's size."""
    s2: bool = False
    """Look at each image at several scales with the same tower; features are laid side by side (on channels)."""
    s2_scales: tuple[Pixels, ...] | None = None
    """Sides in pixels, multiples of the smallest; default: once, twice and three times the tower's size."""


class _ResolvedSettings(BaseModel):
    """What is known when the model's folders have been read. Nothing is left open."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    mm_projector_type: str
    """"linear", "mlpNx_gelu" or "identity"."""
    mm_hidden_size: PositiveCount
    """Width of the tower's features."""
    hidden_size: PositiveCount
    """Width of the language model's embeddings."""
    mm_vision_select_layer: _Layer | tuple[_Layer, ...]
    """Index into the tower's hidden states, or several whose features are laid side by side."""
    mm_vision_select_feature: _Feature
    """Whether the tower's prefix tokens are dropped."""
    s2_scales: tuple[Pixels, ...] = ()
    """Sides in pixels at which the tower looks at each image; none without S2."""
    image_aspect_ratio: str
    """How images become the tower's size."""
    image_grid_pinpoints: tuple[tuple[Pixels, Pixels], ...] = ()
    """Canvases (width, height) of anyres."""

    @property
    def s2(self) -> bool:
        """Whether the tower looks at several scales."""
        return bool(self.s2_scales)


# pydantic orders fields by the reversed order of the bases, and llava.json keeps that order.
class ModelGeometry(AddableSettings, _ResolvedSettings):
    """The geometry of a model, resolved."""

    @classmethod
    def resolve(cls, asked: "GeometrySettings", **resolved: Any) -> Self:
        """Return what ``asked`` means for a model; ``resolved`` has the values that only its folders tell."""
        said = {name: getattr(asked, name) for name in cls.model_fields.keys() & type(asked).model_fields.keys()}
        return cls.model_validate(said | resolved)


class GeometrySettings(AddableSettings, _AskedSettings):
    """The geometry of a model as a recipe asks for it."""

    @field_validator("mm_projector_type")
    @classmethod
    def known_projector(cls, value: str) -> str:
        """Refuse a projector that LLaVA does not know."""
        if value not in ("linear", "identity") and not re.fullmatch(PROJECTOR, value):
            raise ValueError('unknown projector; expected "linear", "identity" or "mlpNx_gelu" such as "mlp2x_gelu"')
        return value

    @field_validator("image_grid_pinpoints", "s2_scales", mode="before")
    @classmethod
    def written_out(cls, value: object) -> object:
        """Take the texts that some of LLaVA's configs have: "[(336, 672), (672, 336)]", "336,672,1008"."""
        return read_literal(value) if isinstance(value, str) else value

    @field_validator("mm_vision_select_layer")
    @classmethod
    def some_layer(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        """Refuse no layer at all; a single one needs no list."""
        if value == ():
            raise ValueError("expected at least one layer, such as -2")
        return value[0] if isinstance(value, tuple) and len(value) == 1 else value

    @model_validator(mode="after")
    def scales_make_a_grid(self) -> Self:
        """Refuse scales that S2 cannot lay over one another."""
        if not self.s2:
            if self.s2_scales is not None:
                raise ValueError("s2_scales have no effect without s2 = true")
            return self
        if self.mm_vision_select_feature != "patch":
            raise ValueError(
                "s2 lays patches of several scales over one another and keeps no class token: set "
                "mm_vision_select_feature = 'patch'"
            )
        scales = self.s2_scales
        if scales is not None and (not scales or any(scale % min(scales) for scale in scales)):
            raise ValueError(f"s2_scales = {scales}: expected multiples of the smallest, such as (336, 672, 1008)")
        return self


# Settings of AddableSettings that LLaVA's own code and transformers' know.
_LLAVAS = ("mm_patch_merge_type", "mm_use_im_start_end", "mm_use_im_patch_token")
_WIDTHS = ("mm_hidden_size", "hidden_size")  # results of the parts, which nobody sets
GEOMETRY_NAMES = tuple(name for name in ModelGeometry.model_fields if name not in _WIDTHS)
# What the features of an image depend on, given its pixels and the tower's weights ...
FEATURE_NAMES = ("mm_vision_select_layer", "mm_vision_select_feature", "s2_scales")
# ... and what its pixels depend on.
_PIXEL_NAMES = ("s2", "image_grid_pinpoints", "image_aspect_ratio")
# image_aspect_ratio is LLaVA's DataArguments'; all else is in the model's section.
FEATURE_KEYS = tuple(
    f"{'data' if name == 'image_aspect_ratio' else 'model'}.{name}" for name in FEATURE_NAMES + _PIXEL_NAMES
)


def is_addable(name: str, trained: object) -> bool:
    """Tell whether a model that was ``trained`` with this value of a setting may go on with another one."""
    field = ModelGeometry.model_fields.get(name)
    return field is not None and not field.is_required() and trained in (None, field.default)


def find_unknown_elsewhere(geometry: ModelGeometry) -> str | None:
    """Return the first setting in use that other programs do not know and would pass over in silence, or None."""
    own = [name for name in AddableSettings.model_fields if name not in _LLAVAS]
    return next((name for name in own if not is_addable(name, getattr(geometry, name))), None)


def compute_feature_width(hidden_size: int, select_layer: int | Sequence[int], s2_scales: Sequence[int] = ()) -> int:
    """Return the width of the features: each layer and each scale adds the tower's own."""
    num_layers = 1 if isinstance(select_layer, int) else len(select_layer)
    return hidden_size * num_layers * max(1, len(s2_scales))


def read_addable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the addable settings in a config.json: what is missing or empty there is as without it."""
    found = {name: config.get(name) for name in AddableSettings.model_fields}
    defaults = {name: AddableSettings.model_fields[name].default for name in found}
    values = {name: defaults[name] if value in (None, "") else value for name, value in found.items()}
    return {name: bool(value) if isinstance(defaults[name], bool) else value for name, value in values.items()}
