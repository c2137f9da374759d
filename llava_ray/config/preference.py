"""The settings of objectives over pairs of answers, and which objectives those are."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from llava_ray.config.schema import ConfigSection

RecordKind = Literal["auto", "instruction", "preferences"]
PairObjectiveName = Literal["dpo", "ipo", "hinge", "robust", "dpo_norm", "simpo", "orpo"]
PAIR_OBJECTIVES = frozenset({"dpo", "ipo", "hinge", "robust", "dpo_norm", "simpo", "orpo"})
# Those that compare the policy with the model it starts from.
WITH_REFERENCE = PAIR_OBJECTIVES - {"simpo", "orpo"}


class PreferenceConfig(ConfigSection):
    """Learning from pairs of answers (train.objective)."""

    beta: PositiveFloat = 0.1
    """How much the policy is held to the reference (IPO's tau, ORPO's lambda); about 0.01 to 0.5. Averages over tokens
    (dpo_norm, simpo) take more: 2 to 10."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that may be the wrong way round (dpo, dpo_norm, robust, simpo)."""
    rpo_alpha: NonNegativeFloat = 0.0
    """Weight of the cross-entropy of the chosen answers beside the objective (not orpo, which has it)."""
    simpo_gamma: NonNegativeFloat = 0.5
    """SimPO's target margin of the rewards."""


def follow_objective(values: Any) -> Any:
    """Let ``data.kind = "auto"`` follow ``train.objective``, in settings that are not validated yet."""
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        return values
    train = values.get("train")
    objective = train.get("objective") if isinstance(train, dict) else getattr(train, "objective", None)
    over_pairs = isinstance(objective, str) and objective in PAIR_OBJECTIVES  # what is no text is refused by its key
    if over_pairs and values["data"].get("kind", "auto") == "auto":
        return {**values, "data": {**values["data"], "kind": "preferences"}}
    return values


class WithPreferences(ConfigSection):
    """What settings of a run with an objective over pairs must agree on."""

    preference: PreferenceConfig = PreferenceConfig()

    @model_validator(mode="before")
    @classmethod
    def kind_follows_objective(cls, values: Any) -> Any:
        """Prepare preferences where the objective learns from them."""
        return follow_objective(values)

    @model_validator(mode="after")
    def pairs_are_learnt_from(self) -> Self:
        """Reject preferences without an objective over pairs and the reverse, and settings without effect."""
        config: Any = self
        objective, kind = config.train.objective, config.data.kind
        if config.data.sources:  # each has a kind of its own
            kind = "auto"
        if objective not in PAIR_OBJECTIVES and kind == "preferences":
            raise ValueError(
                f"data.kind = 'preferences' with train.objective = {objective!r}: pairs are learnt by "
                f"{', '.join(sorted(PAIR_OBJECTIVES))}; choose one, or data.kind = 'instruction'"
            )
        if objective in PAIR_OBJECTIVES and kind == "instruction":
            raise ValueError(
                f"train.objective = {objective!r} learns from pairs, but data.kind = 'instruction'; leave it out, or "
                "set train.objective = 'cross_entropy'"
            )
        given = self.preference.model_fields_set
        if objective not in PAIR_OBJECTIVES and self.preference != PreferenceConfig():
            raise ValueError(
                f"preference.{sorted(given)[0]} has no effect with train.objective = {objective!r}; leave it out, or "
                "choose an objective over pairs"
            )
        if objective == "orpo" and self.preference.rpo_alpha:
            raise ValueError("preference.rpo_alpha with train.objective = 'orpo', which has that term; leave it out")
        if self.preference.label_smoothing and objective in ("ipo", "hinge", "orpo"):
            raise ValueError(
                f"preference.label_smoothing has no effect with train.objective = {objective!r}; leave it out"
            )
        if objective in PAIR_OBJECTIVES and config.model.attn_implementation != "sdpa":
            raise ValueError(
                f"train.objective = {objective!r} needs model.attn_implementation = 'sdpa': both answers of a pair "
                "attend to one prompt, which a mask of the whole row cannot say"
            )
        return self

    @model_validator(mode="after")
    def margin_is_used(self) -> Self:
        """Reject a target margin without SimPO."""
        config: Any = self
        objective = config.train.objective
        if self.preference.simpo_gamma != PreferenceConfig().simpo_gamma and objective != "simpo":
            raise ValueError(f"preference.simpo_gamma has no effect with train.objective = {objective!r}; leave it out")
        return self
