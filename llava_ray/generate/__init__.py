"""Answers from a model: batched decoding, and data sets answered by actors."""
