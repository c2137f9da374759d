"""From records to micro-batches: shards, token lengths, the plan, the stream. Imports ``model`` and below.

``records`` → ``validation`` → ``shards`` is what ``preparation`` does with Ray Data; ``examples`` and ``lengths`` say
how long each sample is; ``plan`` fixes every step from that; ``stream`` carries the plan out.
"""
