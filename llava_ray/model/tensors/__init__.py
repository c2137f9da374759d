"""Files of tensors, read and written one tensor at a time, without running anything that they hold."""
