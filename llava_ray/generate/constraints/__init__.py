"""Constrained answers: JSON Schemas, regular expressions, choices and grammars as masks of the next token."""
