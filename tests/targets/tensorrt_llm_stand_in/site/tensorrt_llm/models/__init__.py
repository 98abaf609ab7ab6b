"""What is left of the engine flow that the PyTorch backend uses: quantisation."""
