"""Reviews by a judge behind an API: rubric, verdicts, limiter, ledger, reviewers. Independent of benchmarks and torch.

rubric, verdict, calls, prices, headers, faults, rates and ledger_file are pure; limiter, ledger, reviewer and pool are
Ray's.
"""
