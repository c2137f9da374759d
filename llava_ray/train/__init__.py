"""Fine-tuning: parameter groups, ZeRO, one explicit loop, checkpoints, the run and its recorder.

Start reading at ``loop``: it is what every worker runs. ``trainer`` starts the workers, ``runs`` knows names and
folders, ``journal`` is the one process that writes metrics and the ledger.
"""
