"""PyTorch -> ONNX: the vision, prefill and decode graphs, their op domains, and weights by reference."""
