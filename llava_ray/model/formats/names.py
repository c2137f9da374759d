"""Canonical names of tensors: those of ``Llava`` and its parts, to which every layout's names are converted.

The layouts' names are pure renames, reversible without loss (``original.names``, ``hub.names``):

========================== ====================================================== ======================================
ours                       original (liuhaotian/llava-…)                          hub (llava-hf/…)
========================== ====================================================== ======================================
projector.0.weight         model.mm_projector.0.weight                            multi_modal_projector.linear_1.weight
projector.2.weight         model.mm_projector.2.weight                            multi_modal_projector.linear_2.weight
projector.weight (linear)  model.mm_projector.weight                              (cannot be expressed)
image_newline              model.image_newline                                    image_newline
language_model.model.…     model.…                                                language_model.model.…
language_model.lm_head.…   lm_head.…                                              language_model.lm_head.…
vision_tower.…             model.vision_tower.vision_tower.vision_model.…         vision_tower.vision_model.…
========================== ====================================================== ======================================

The hub's names are those that transformers before 4.52 and vLLM know; transformers still loads them. A DINOv2 tower
has no ``vision_model`` level in any layout.
"""

import re

# Buffers in older files that every model computes itself.
COMPUTED = re.compile(r"(\.inv_freq|\.position_ids)$")


PROJECTOR_PREFIX = "projector."


LANGUAGE_MODEL_PREFIX = "language_model."


VISION_TOWER_PREFIX = "vision_tower."


IMAGE_NEWLINE = "image_newline"


VISION_MODEL_PREFIX = "vision_model."


def bare_tower_name(name: str) -> str:
    """Return a tower's tensor name without the level that only some versions of transformers write."""
    return name.removeprefix(VISION_MODEL_PREFIX)
