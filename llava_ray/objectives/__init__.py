"""Training objectives: a model and a packed row in, losses and metrics out."""
