"""Small commands to look at a model."""
