"""OpenVINO: ONNX graphs that it reads when a bundle is opened, with its own attention and caches inside it."""
