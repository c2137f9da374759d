"""Images are known by their content, within a bound."""

import torch

from llava_ray.generate.vision_cache import VisionCache, image_key


def test_the_least_used_image_goes_first() -> None:
    image = torch.zeros(4, 8)
    cache = VisionCache(3 * image.nbytes)
    for name in "abc":
        cache.keep(name, image)
    assert cache.find("a") is image
    cache.keep("d", image)
    assert [cache.find(name) is not None for name in "abcd"] == [True, False, True, True]
    cache.keep("d", torch.zeros(8, 8))
    assert cache.num_bytes == 3 * image.nbytes
    assert len(cache) == 2
    cache.keep("huge", torch.zeros(100, 100))
    assert cache.find("huge") is None
    assert (cache.num_queries, cache.num_hits) == (6, 4)


def test_keys_are_of_the_content() -> None:
    assert image_key(b"a") == image_key(b"a") != image_key(b"b")
    assert VisionCache(0).find(image_key(b"a")) is None
