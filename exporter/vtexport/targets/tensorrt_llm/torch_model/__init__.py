"""LLaVA with pruned visual tokens as a model of TensorRT-LLM, registered from outside of its source tree.

A bundle of target `tensorrt-llm` has a folder `vtexport_llava`, which `trtllm-serve --custom_module_dirs` imports and
which calls `register`. The modules here import tensorrt_llm, except `description`, `stages`, `packing` and `report`.
They need a GPU machine's torch and transformers only, older ones than the rest of vtexport does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def register(bundle: Path, module: str) -> Any:
    """Let TensorRT-LLM load the LLaVA checkpoint that `bundle` was built from with the bundle's pruning.

    Args:
        bundle: the bundle's folder.
        module: the name of the module that keeps the class returned here as `VtexportLlava`.

    Raises:
        BundleError: the bundle is damaged.
        TargetError: this TensorRT-LLM differs from those that this was written for.
    """
    from vtexport.targets.tensorrt_llm.torch_model.contract import check_contract
    from vtexport.targets.tensorrt_llm.torch_model.description import Description

    description = Description.read(bundle)
    check_contract()
    from vtexport.targets.tensorrt_llm.torch_model.registration import register_model

    return register_model(description, module)
