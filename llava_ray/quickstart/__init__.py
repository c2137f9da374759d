"""Small real weights and data out of Python packages, for a first model without hub or GPU."""
