"""Attention and its metadata."""

from .interface import AttentionBackend, AttentionInputType, AttentionMetadata
from .trtllm import TrtllmAttention, TrtllmAttentionMetadata

__all__ = [
    "AttentionBackend",
    "AttentionInputType",
    "AttentionMetadata",
    "TrtllmAttention",
    "TrtllmAttentionMetadata",
]
