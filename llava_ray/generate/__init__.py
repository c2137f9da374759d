"""Generation: batched decoding (``decoding``), chats (``chat``), batch inference over data sets (``answers``)."""
