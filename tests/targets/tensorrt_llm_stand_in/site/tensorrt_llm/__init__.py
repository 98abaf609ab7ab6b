"""The part of TensorRT-LLM 1.2 that a model of its PyTorch backend meets, on a CPU. See `signatures.json`."""

__version__ = "1.2.1"
