"""ONNX Runtime: the default target, on any CPU."""
