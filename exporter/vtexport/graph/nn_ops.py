"""Composite ops of the domain `vtexport.nn`: parts of a transformer that runtimes have kernels for.

Tracing turns each into one node (`vtexport.graph.tracing.own_ops`), so that a target can put its own fused kernel in
its place (`vtexport.targets.onnxruntime.lowering`), and any other runtime runs the ONNX function body
(`vtexport.graph.functions`). The functions here compute the same in PyTorch.

Shapes: hidden rows are [B, S, H * D], caches [B, G, M, D]; H query heads share G key heads in groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, S, heads * D] -> [B, heads, S, D]."""
    batch, rows, width = x.shape
    return x.reshape(batch, rows, heads, width // heads).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """[B, heads, S, D] -> [B, S, heads * D]."""
    return x.transpose(1, 2).flatten(2)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, x / sqrt(mean(x²) + epsilon) * weight, the mean in fp32; [..., C]."""
    if has_torch_function((x, weight)):
        return handle_torch_function(rms_norm, (x, weight), x, weight, epsilon)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return weight * normed.to(x.dtype)


def rotary(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotary position embedding, halves convention (not interleaved).

    Args:
        x: [B, S, H * D].
        positions: [B, S] int64, rows of the tables.
        cos: [max_positions, D / 2].
        sin: [max_positions, D / 2].
        num_heads: H.
    """
    inputs = (x, positions, cos, sin)
    if has_torch_function(inputs):
        return handle_torch_function(rotary, inputs, *inputs, num_heads)
    low, high = _split(x, num_heads).chunk(2, dim=-1)
    c, s = cos[positions][:, None], sin[positions][:, None]
    return _merge(torch.cat([low * c - high * s, high * c + low * s], dim=-1))


def full_attention(query: Tensor, key: Tensor, value: Tensor, num_heads: int, scale: float) -> Tensor:
    """Attention without a mask, [B, S, H * D] each; returns [B, S, H * D]."""
    if has_torch_function((query, key, value)):
        return handle_torch_function(full_attention, (query, key, value), query, key, value, num_heads, scale)
    q, k, v = (_split(x, num_heads) for x in (query, key, value))
    return _merge(F.scaled_dot_product_attention(q, k, v, scale=scale))


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, kv_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a whole prompt, padded on the right (later rows never reach earlier ones).

    Args:
        query: [B, S, H * D].
        key: [B, S, G * D].
        value: [B, S, G * D].
        num_heads: H.
        kv_heads: G.
        scale: factor on query · key.

    Returns:
        output [B, S, H * D] and the cache entries key, value [B, G, S, D].
    """
    inputs = (query, key, value)
    if has_torch_function(inputs):
        return handle_torch_function(causal_attention, inputs, *inputs, num_heads, kv_heads, scale)
    q, k, v = _split(query, num_heads), _split(key, kv_heads), _split(value, kv_heads)
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return _merge(output), k, v


def cached_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    length: Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of new tokens to their row's cache and, causally, to each other; the cache has room for them.

    Args:
        query: [B, S, H * D].
        key: [B, S, G * D].
        value: [B, S, G * D].
        past_key: [B, G, M, D], filled up to `length`.
        past_value: as `past_key`.
        length: [B] int64, tokens already in each row's cache, at most M - S.
        num_heads: H.
        kv_heads: G.
        scale: factor on query · key.

    Returns:
        output [B, S, H * D] and the caches with the new tokens from place `length` on.
    """
    inputs = (query, key, value, past_key, past_value, length)
    if has_torch_function(inputs):
        return handle_torch_function(cached_attention, inputs, *inputs, num_heads, kv_heads, scale)
    q, k, v = _split(query, num_heads), _split(key, kv_heads), _split(value, kv_heads)
    own = length[:, None] + torch.arange(query.shape[1], device=length.device)
    to = own[:, None, :, None].expand(-1, kv_heads, -1, past_key.shape[3])
    keys, values = past_key.scatter(2, to, k), past_value.scatter(2, to, v)
    mask = (torch.arange(past_key.shape[2], device=length.device) <= own[..., None])[:, None]
    output = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return _merge(output), keys, values
