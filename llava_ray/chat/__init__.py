"""Conversations: what was said, how a template writes it down, and which tokens are learnt."""
