"""The benchmarks, one file each: reading of official files, prompts, grading."""
