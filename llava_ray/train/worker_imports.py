"""What the processes of a run import; a fork server imports this module once for them all (see ``worker_forks``)."""

import importlib

from llava_ray.train.deepspeed_import import import_deepspeed

_MODULES = (
    "ray.data",
    "ray.train.torch",
    "llava_ray.data.stream",
    "llava_ray.train.run_recorder",
    "llava_ray.train.stopping",
    "llava_ray.model.formats.vocabulary",
    "llava_ray.train.loop",
    # What transformers imports only when the first model is read.
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.clip.modeling_clip",
)

for _name in _MODULES:
    importlib.import_module(_name)
import_deepspeed()
