"""From records to micro-batches: shards, token lengths, the plan, the stream. Imports ``model`` and below.

``preparation`` runs ``records`` → ``validation`` → ``shards`` with Ray Data; ``examples`` and ``lengths`` compute how
long each sample is; ``plan`` fixes every step from that; ``stream`` executes the plan.
"""
