"""Which nodes Ray's autoscaler would make of the cloud files for what we ask: its own scheduler, without a cloud."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTERS = Path(__file__).parents[2] / "clusters"
CLOUD = ["a100", "h100", "gcp_a100"]


def launches(file: str, demands: list[tuple[dict[str, float], str]], unavailable: str | None = None) -> dict[str, int]:
    """How many nodes of each type it makes for tasks of these sizes in these pools."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.schema import AutoscalerInstance
    from ray.autoscaler.v2.utils import ResourceRequestUtil
    from ray.core.generated.autoscaler_pb2 import NodeState, NodeStatus
    from ray.core.generated.common_pb2 import LABEL_OPERATOR_IN
    from ray.core.generated.instance_manager_pb2 import Instance

    document: dict[str, Any] = yaml.safe_load((CLUSTERS / f"{file}.yaml").read_text())
    config = AutoscalingConfig(document, skip_content_hash=True)
    requests = [
        ResourceRequestUtil.make(size, label_selectors=[[("pool", LABEL_OPERATOR_IN, [pool])]])
        for size, pool in demands
    ]
    head = NodeState(ray_node_type_name="head", node_id=b"head", status=NodeStatus.RUNNING, instance_id="head")
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(requests),
        current_instances=[
            AutoscalerInstance(
                ray_node=head,
                cloud_instance_id="head",
                im_instance=Instance(instance_type="head", status=Instance.RAY_RUNNING, instance_id="head"),
            )
        ],
        recoverable_resource_availabilities={unavailable: 0.0} if unavailable else {},
    )
    found: Counter[str] = Counter()
    for launch in ResourceDemandScheduler(None).schedule(request).to_launch:
        found[launch.instance_type] += launch.count
    return dict(found)


@pytest.mark.parametrize("file", CLOUD)
def test_each_pool_grows_for_its_own_work_spot_first(file: str) -> None:
    worker, vision, decode = {"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5, "GPU": 1.0}, {"CPU": 0.5}
    wanted = [(worker, "train")] * 8 + [(vision, "vision")] * 5 + [(decode, "decode")] * 65
    assert launches(file, wanted) == {"train_spot": 1, "vision_spot": 2, "decode_spot": 2}


@pytest.mark.parametrize("file", CLOUD)
@pytest.mark.parametrize("pool", ["train", "vision", "decode"])
def test_what_spot_cannot_give_is_made_on_demand(file: str, pool: str) -> None:
    size = {"CPU": 0.5} if pool == "decode" else {"CPU": 0.5, "GPU": 1.0}
    assert launches(file, [(size, pool)], unavailable=f"{pool}_spot") == {f"{pool}_on_demand": 1}
