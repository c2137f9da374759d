"""Answers: batched decoding of one model (``decoding``), and whole data sets answered with Ray Data (``answers``)."""
