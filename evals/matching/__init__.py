"""Rules that read answers: letters, yes or no, numbers, short texts. Nothing is guessed."""
