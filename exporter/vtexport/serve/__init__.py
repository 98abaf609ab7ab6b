"""An OpenAI-compatible server of one bundle: continuous batching over any engine that lets rows join."""
