"""What the modules beside this one use of TensorRT-LLM, checked before any of them is imported."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from vtexport.errors import TargetError

#: the first version with all of it, and the versions whose sources were read
OLDEST, READ = (1, 2), "the 1.2 line"

_TORCH = "tensorrt_llm._torch"
#: module -> name in it -> parameters that we pass by name, or that we override by position
CONTRACT: dict[str, dict[str, tuple[str, ...]]] = {
    f"{_TORCH}.attention_backend": {
        "TrtllmAttention.Metadata": (),
        "TrtllmAttentionMetadata": (
            *("max_num_requests", "max_num_tokens", "max_num_sequences", "kv_cache_manager", "is_cuda_graph"),
            *("seq_lens", "num_contexts", "max_seq_len", "_max_seq_len_storage", "cuda_graph_buffers"),
            *("kv_cache_params", "request_ids", "prompt_lens", "runtime_features", "beam_width"),
        ),
        "TrtllmAttentionMetadata.__post_init__": ("self",),
        "TrtllmAttentionMetadata.prepare": ("self",),
    },
    f"{_TORCH}.attention_backend.interface": {
        "PositionalEmbeddingParams": ("type", "rope"),
        "RopeParams.from_config": ("config",),
    },
    f"{_TORCH}.metadata": {
        "KVCacheParams": ("use_cache", "num_cached_tokens_per_seq", "num_extra_kv_tokens"),
    },
    f"{_TORCH}.models.modeling_auto": {"AutoModelForCausalLM.from_config": ("config",)},
    f"{_TORCH}.models.modeling_multimodal_utils": {
        "fuse_input_embeds": ("embedding_layer", "input_ids", "mm_embeds", "mm_token_ids"),
    },
    f"{_TORCH}.models.modeling_utils": {
        "DecoderModel": ("model_config",),
        "DecoderModelForCausalLM": ("model", "config", "hidden_size", "vocab_size"),
        "register_auto_model": ("name",),
    },
    f"{_TORCH}.modules.attention": {
        "Attention": (
            *("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "bias"),
            *("pos_embd_params", "rope_fusion", "layer_idx", "dtype", "dense_bias", "config"),
        ),
        "Attention.forward": ("self", "position_ids", "hidden_states", "attn_metadata"),
        "Attention.apply_rope": ("self", "q", "k", "v", "position_ids"),
        "Attention.split_qkv": ("self", "q", "k", "v"),
    },
    f"{_TORCH}.modules.decoder_layer": {"DecoderLayer": ()},
    f"{_TORCH}.modules.embedding": {
        "Embedding": ("num_embeddings", "embedding_dim", "dtype", "mapping", "tensor_parallel_mode", "gather_output"),
    },
    f"{_TORCH}.modules.gated_mlp": {"GatedMLP": ("hidden_size", "intermediate_size", "bias", "dtype", "config")},
    f"{_TORCH}.modules.linear": {"TensorParallelMode.COLUMN": ()},
    f"{_TORCH}.modules.rms_norm": {"RMSNorm": ("hidden_size", "eps", "dtype")},
    f"{_TORCH}.modules.logits_processor": {
        "LogitsProcessor.forward": ("self", "hidden_states", "lm_head", "attn_metadata", "return_context_logits"),
    },
    f"{_TORCH}.utils": {"is_torch_compiling": ()},
    "tensorrt_llm.functional": {"PositionEmbeddingType.rope_gpt_neox": ()},
    "tensorrt_llm.inputs": {
        "BaseMultimodalInputProcessor": ("model_path", "config", "tokenizer", "trust_remote_code"),
        "InputProcessor": (),
        "register_input_processor": ("processor_cls", "model_type", "placeholder_metadata"),
        "MultimodalPlaceholderMetadata": ("placeholder_map", "placeholder_placement"),
        "MultimodalPlaceholderPlacement.BEFORE_TEXT": (),
    },
}


def check_contract() -> None:
    """Refuse a TensorRT-LLM that lacks something of `CONTRACT`.

    Raises:
        TargetError: it is not installed, too old, or differs.
    """
    if find_spec("tensorrt_llm") is None:
        raise TargetError("tensorrt_llm is not installed; run this where TensorRT-LLM 1.2 or later is")
    version = str(importlib.import_module("tensorrt_llm").__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers < OLDEST:
        raise TargetError(f"tensorrt_llm {version} is too old; install 1.2 or later")
    differences = list(differing())
    if differences:
        raise TargetError(
            f"tensorrt_llm {version} differs from the versions that this was written for ({READ}): "
            f"{'; '.join(differences)}; install 1.2.1, or report this version"
        )


def differing() -> Iterator[str]:
    """What of `CONTRACT` the installed TensorRT-LLM lacks, in words."""
    for module_name, names in CONTRACT.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            yield f"{module_name} is missing"
            continue
        for name, parameters in names.items():
            value = _looked_up(module, name)
            if value is None:
                yield f"{module_name}.{name} is missing"
            elif parameters:
                missing = [parameter for parameter in parameters if parameter not in parameters_of(value)]
                if missing:
                    yield f"{module_name}.{name} takes no {', '.join(missing)}"


def _looked_up(module: Any, name: str) -> Any:
    value = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def parameters_of(value: Any) -> list[str]:
    """The names of what a function, or a class's constructor, takes."""
    # Metaclasses of TensorRT-LLM hide the constructor's parameters behind their own call.
    return list(inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters)
