"""Rules that parse answers: letters, yes or no, numbers, short texts. They never guess."""
