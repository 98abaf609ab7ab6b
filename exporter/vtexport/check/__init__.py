"""The reference model, run by transformers, and the comparison of an engine with it."""
