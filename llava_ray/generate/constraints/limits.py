"""The limits within which grammars are compiled and held."""

import llguidance


def grammar_limits() -> "llguidance.LLParserLimits":
    """Return limits that keep a mask within some 100 ms, and a grammar's tables within some 40 MB."""
    return llguidance.LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=20_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )
