"""Small pretrained weights and data from Python packages, for a first model without hub or GPU."""
