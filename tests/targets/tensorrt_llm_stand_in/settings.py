"""What a server is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Settings:
    """TensorRT-LLM's options by our names, and in which ways the stand-in is to behave."""

    #: sequences of a pass
    max_batch_size: int = 8
    #: tokens of a pass
    max_num_tokens: int = 8192
    #: tokens of a sequence; at most what the model infers, which is the default
    max_seq_len: int | None = None
    #: of the cache
    tokens_per_block: int = 8
    #: passes of generations alone are recorded, at first for every size of batch with dummy requests
    cuda_graphs: bool = False
    #: what the metadata says; no request has a prefix of another's here
    enable_block_reuse: bool = False
    #: prompts are cut where a pass is full
    enable_chunked_prefill: bool = False
    #: what the metadata is made for
    max_beam_width: int = 1
    #: what the mapping says; there is one process
    tensor_parallel: int = 1
    #: as above
    pipeline_parallel: int = 1
    #: what the model is told
    spec_config: Any = None
    #: what the model is told; None for no quantisation
    quant_config: Any = None
    #: attention takes the engine's metadata, whatever the model passes
    torch_compile: bool = False
    #: passes with dummy requests before the first real one
    warmup: bool = True
    #: images are forgotten once a prompt is computed, as after 1.2
    strip_after_prefill: bool = False
    #: weights come in TensorRT-LLM's own kind of dictionary, which is none of Python's
    consumable_weights: bool = True
    #: of the cache; by default enough for all
    blocks: int | None = None
