"""Files of tensors: reading and writing one tensor at a time, without executing code in them."""
