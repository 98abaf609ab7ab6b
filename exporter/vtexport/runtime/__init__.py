"""Images and questions in, answers out, over any bundle."""
