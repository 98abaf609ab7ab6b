"""Writes bundles in the layouts of other servers and runtimes."""
