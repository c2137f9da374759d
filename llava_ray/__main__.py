"""``python -m llava_ray`` is the console script ``llava-ray``."""

from llava_ray.command_line import main

if __name__ == "__main__":
    main()
