"""llava_ray's own layout: a self-describing folder."""
