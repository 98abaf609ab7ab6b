"""What `plugins/` compiles to, as Python sees it."""
