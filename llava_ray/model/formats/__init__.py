"""Model folders in every layout: what they are, where their parts and tensors lie, and how they are written."""
