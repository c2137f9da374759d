"""The commands, each with a `main(arguments)` that can be called."""
