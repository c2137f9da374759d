"""Images: read safely, brought to the tower's geometry, normalised."""
