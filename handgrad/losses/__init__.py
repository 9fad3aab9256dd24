"""The losses: layers with a second input, the target, that start the backward pass."""
