"""The model as transformers runs it, and what compares an engine with it."""
