"""TensorRT engines: full TensorRT with the plugins, and TensorRT for RTX, which builds without a GPU."""
