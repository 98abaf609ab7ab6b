"""The features of TensorRT-LLM that do not go with pruning inside the decoder, each refused by name."""

from __future__ import annotations

from typing import Any

from vtexport.errors import InputError

#: features of `AttentionRuntimeFeatures` -> what they are called where a user sets them, and why they are refused
_FEATURES = {
    "cache_reuse": (
        "kv_cache_config.enable_block_reuse",
        "blocks behind a stage hold the tokens of one image only, and prompts with other images have equal token ids",
    ),
    "chunked_prefill": ("enable_chunked_prefill", "a stage rates the tokens of a whole prompt at once"),
    "has_speculative_draft_tokens": ("speculative_config", "draft tokens have no lengths per stage"),
}


def refuse_features(metadata: Any) -> None:
    """Refuse attention metadata made for features that pruning inside the decoder cannot do.

    Raises:
        InputError: a feature is on.
    """
    features = metadata.runtime_features
    for name, (option, reason) in _FEATURES.items():
        if features is not None and getattr(features, name, False):
            raise InputError(f"{option} cannot go with pruning inside the decoder: {reason}; turn it off")
    if metadata.max_num_sequences is not None and metadata.max_num_sequences > metadata.max_num_requests:
        raise InputError(
            "max_beam_width above 1 cannot go with pruning inside the decoder: beams share blocks; set it to 1"
        )
    if getattr(metadata, "sparse_attention_config", None) is not None:
        raise InputError(
            "sparse_attention_config cannot go with pruning inside the decoder: both choose what attention reads; "
            "leave it out"
        )


def refuse_reuse(metadata: Any) -> None:
    """Refuse attention metadata made for the reuse of blocks, which is wrong wherever there are visual tokens.

    Raises:
        InputError: it is on.
    """
    features = metadata.runtime_features
    if features is not None and getattr(features, "cache_reuse", False):
        raise InputError(
            "kv_cache_config.enable_block_reuse cannot go with visual tokens: prompts about other images have equal token "
            "ids, by which blocks are taken for equal; turn it off"
        )


def refuse_compilation() -> None:
    """Refuse a step of a model that torch.compile has taken, in which attention takes the engine's own metadata.

    Raises:
        InputError: torch.compile is on.
    """
    from tensorrt_llm._torch.utils import is_torch_compiling

    if is_torch_compiling():
        raise InputError(
            "torch_compile_config cannot go with pruning inside the decoder: compiled layers all take one metadata; leave "
            "it out"
        )


def refuse_model(config: Any) -> None:
    """Refuse a `ModelConfig` of TensorRT-LLM that pruning inside the decoder cannot do.

    Raises:
        InputError: a feature is on.
    """
    mapping = config.mapping
    for name, option in (
        ("tp_size", "tensor_parallel_size"),
        ("pp_size", "pipeline_parallel_size"),
        ("cp_size", "context_parallel_size"),
    ):
        if getattr(mapping, name, 1) > 1:
            raise InputError(
                f"{option} {getattr(mapping, name)} cannot go with pruning inside the decoder: scores need every head and "
                "layer on one GPU; set it to 1"
            )
    if getattr(config, "spec_config", None) is not None:
        raise InputError(
            "speculative_config cannot go with pruning inside the decoder: draft tokens have no lengths per stage; "
            "leave it out"
        )
    if getattr(config, "lora_config", None) is not None:
        raise InputError(
            "lora_config cannot go with pruning inside the decoder, whose layers apply no adapters; merge the adapter into "
            "the checkpoint, and build the bundle from that"
        )
    backend = getattr(config, "attn_backend", "TRTLLM")
    if backend != "TRTLLM":
        raise InputError(
            f"attn_backend {backend} cannot go with pruning inside the decoder, whose metadata are those of TRTLLM; "
            "set it to TRTLLM"
        )
