"""The modules of a model: tower, projector, and the forward pass over packed rows. They access no files."""
