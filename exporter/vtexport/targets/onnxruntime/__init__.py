"""ONNX Runtime: the embedded default, on any CPU."""
