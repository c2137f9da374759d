"""Previews of data as a model will see it before any training: tokens, labels, images, losses."""
