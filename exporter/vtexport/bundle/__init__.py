"""The engine folder and its manifest."""
