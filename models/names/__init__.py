"""What the names models share, one job per file; `training` holds the training loop."""
