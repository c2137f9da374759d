"""What a sample costs, from configs, beside what the model itself needs."""

from pathlib import Path

import pytest
from fakes import IMAGE_SIZE
from samples import small_run

from llava_ray.model.assembly import assemble
from llava_ray.model.blueprint import read_blueprint
from llava_ray.model.freezing import freeze
from llava_ray.train.flops import UsefulFlops
from llava_ray.train.planning.costs import estimate_cost


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"model.tune_mm_mlp_adapter": True}, {"model.unfreeze_mm_vision_tower": True}])
def test_costs_are_those_of_the_model_itself(tmp_path: Path, changes: dict[str, object]) -> None:
    config = small_run(tmp_path).replaced(changes)
    cost = estimate_cost(config, read_blueprint(config.model, config.data.image_aspect_ratio))
    parts = assemble(config.model, config.data.image_aspect_ratio)
    freeze(parts.llava, parts.tower, config.model)
    useful = UsefulFlops.measure(parts.llava, parts.tower, IMAGE_SIZE)
    assert cost.token == pytest.approx(useful.token, rel=0.01)
    assert cost.pair == pytest.approx(sum(flops for flops, _ in useful.pairs), rel=0.01)
    assert cost.image == pytest.approx(useful.view, rel=0.01)
    elsewhere = config.replaced({"model.unfreeze_mm_vision_tower": False, "data.vision_features": "cached"})
    assert estimate_cost(elsewhere, read_blueprint(config.model, "pad")).image == 0
