"""Python access to what `plugins/` compiles to."""
