"""What is measured and shown: of a model, of a bundle, of this machine."""
