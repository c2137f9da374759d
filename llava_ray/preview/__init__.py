"""What a model will see of data before any training: tokens, labels, images, losses."""
