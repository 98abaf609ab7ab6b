"""Builds a bundle from a checkpoint and options."""
