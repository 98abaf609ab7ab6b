"""What the command line prints: tables and summaries, made from the library's results."""
