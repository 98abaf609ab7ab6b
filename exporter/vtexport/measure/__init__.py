"""Measurements and pictures of a model, a bundle or this machine."""
