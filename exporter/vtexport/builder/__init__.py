"""A checkpoint and options -> a bundle."""
