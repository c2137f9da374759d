"""Images: safe reading, the tower's geometry, and normalisation."""
