"""Answers: batched decoding of one model (``decoding``), conversations (``chat``), whole data sets (``answers``)."""
