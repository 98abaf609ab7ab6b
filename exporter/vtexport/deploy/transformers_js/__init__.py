"""transformers.js: a bundle of ONNX Runtime's in the layout of its LLaVA."""
