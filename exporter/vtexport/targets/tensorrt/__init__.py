"""TensorRT engines; today through TensorRT for RTX, which builds without a GPU."""
