"""Sweeps: many fine-tuning runs over a space of settings, stopped early, judged on held-out data."""
