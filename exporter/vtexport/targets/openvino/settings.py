"""Devices that OpenVINO has here, and its settings for a bundle."""

from __future__ import annotations

from typing import Any

import openvino as ov

#: what a bundle's dtype is called by OpenVINO: in its settings, and among the capabilities of a device
PRECISIONS = {"fp32": ("f32", "FP32"), "fp16": ("f16", "FP16"), "bf16": ("bf16", "BF16")}


def devices() -> list[str]:
    """The devices of this machine, such as CPU and GPU."""
    return list(ov.Core().available_devices)


def has_device(name: str) -> bool:
    """Whether this machine has device `name`; GPU is any of GPU.0, GPU.1, and so on."""
    return any(name in (known, known.partition(".")[0]) for known in devices())


def computes_in(device: str, dtype: str) -> str:
    """The dtype in which `device` computes a bundle of that dtype: the same if it can, else fp32."""
    capabilities = ov.Core().get_property(device, "OPTIMIZATION_CAPABILITIES")
    return dtype if PRECISIONS[dtype][1] in capabilities else "fp32"


#: channels of activations that share a scale where they are rounded to 8 bits: OpenVINO's own default
_ROUNDED_BLOCK = 32


def config(device: str, dtype: str, threads: int, rounds: bool) -> dict[str, Any]:
    """OpenVINO's settings for a bundle.

    Everything by which OpenVINO would trade accuracy for speed on its own is set: the format of arithmetic and of
    caches, and activations rounded to 8 bits before weights of few bits.

    Args:
        device: OpenVINO's device.
        dtype: the bundle's dtype.
        threads: threads on the CPU; 0 leaves their number to OpenVINO.
        rounds: whether activations are rounded to 8 bits before weights of few bits.
    """
    precision, _ = PRECISIONS[computes_in(device, dtype)]
    chosen: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": _ROUNDED_BLOCK if rounds else 0,
        "PERFORMANCE_HINT": "LATENCY",
    }
    if dtype == "fp32":
        chosen["EXECUTION_MODE_HINT"] = "ACCURACY"
    if threads and device == "CPU":
        chosen["INFERENCE_NUM_THREADS"] = threads
    supported = set(ov.Core().get_property(device, "SUPPORTED_PROPERTIES"))
    return {name: value for name, value in chosen.items() if name in supported}
