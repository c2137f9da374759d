"""Model folders in every layout: detection, the location of parts and tensors, reading and writing."""
