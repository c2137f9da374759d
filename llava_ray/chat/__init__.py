"""Conversations: their turns, the templates that render them, and the tokens that are supervised."""
