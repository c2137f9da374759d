"""Learning from a model's own answers: sampled by actors with its newest weights, rewarded, packed and trained on.

For each step of the plan, ``coordinator`` has ``actor``s answer its questions and reward the answers, turns rewards
into ``advantages``, and packs the answers into the rows that each rank fetches (``source``).
"""
