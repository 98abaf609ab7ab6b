"""vtexport's own ops as nodes of their domains; contracts in `vtexport.pruning.ops` and `vtexport.graph.nn_ops`."""

from __future__ import annotations

import torch

from vtexport.graph.domains import NN, PRUNING
from vtexport.graph.tracing.recorder import Kind, Recorder, Traced, converts


def _rating(query: Traced, count: int) -> list[Kind]:
    return [Kind(torch.float32, (query.shape[0], count))]


@converts("token_score")
def _token_score(r: Recorder, query: Traced, *given: Traced, count: int, scale: float) -> Traced:
    inputs = [query, *given, r.vector(count)]
    return r.node("TokenScore", inputs, {"scale": scale}, like=_rating(query, count), domain=PRUNING)[0]


@converts("token_score_heads")
def _token_score_heads(r: Recorder, query: Traced, *given: Traced, count: int, scale: float, heads: int) -> Traced:
    inputs, attributes = [query, *given, r.vector(count)], {"scale": scale, "heads": heads}
    return r.node("TokenScoreHeads", inputs, attributes, like=_rating(query, count), domain=PRUNING)[0]


@converts("token_select")
def _token_select(r: Recorder, hidden: Traced, score: Traced, keep: int) -> tuple[Traced, ...]:
    batch, number, width = hidden.shape
    kinds = [Kind(hidden.dtype, (batch, keep, width)), *(Kind(torch.int32, (batch, count)) for count in (keep, number))]
    return r.node("TokenSelect", [hidden, score, r.vector(keep)], like=kinds, domain=PRUNING)


@converts("token_recycle")
def _token_recycle(
    r: Recorder, hidden: Traced, rank: Traced, keep: int, pool: int, clusters: int, paper: bool
) -> tuple[Traced, ...]:
    batch, number, width = hidden.shape
    kinds = [
        Kind(hidden.dtype, (batch, clusters, width)),
        Kind(torch.int32, (batch, clusters)),
        Kind(torch.int32, (batch, number)),
    ]
    counts = [r.vector(count) for count in (keep, pool, clusters)]
    return r.node("TokenRecycle", [hidden, rank, *counts], {"paper": int(paper)}, like=kinds, domain=PRUNING)


@converts("rms_norm")
def _rms_norm(r: Recorder, x: Traced, weight: object, epsilon: float) -> Traced:
    return r.node("RMSNorm", [x, weight], {"epsilon": epsilon}, like=[Kind(x.dtype, x.shape)], domain=NN)[0]


@converts("rotary")
def _rotary(r: Recorder, x: Traced, positions: Traced, cos: object, sin: object, num_heads: int) -> Traced:
    inputs, attributes = [x, positions, cos, sin], {"num_heads": num_heads}
    return r.node("Rotary", inputs, attributes, like=[Kind(x.dtype, x.shape)], domain=NN)[0]


@converts("full_attention")
def _full_attention(r: Recorder, query: Traced, key: Traced, value: Traced, num_heads: int, scale: float) -> Traced:
    inputs, attributes = [query, key, value], {"num_heads": num_heads, "scale": scale}
    return r.node("FullAttention", inputs, attributes, like=[Kind(query.dtype, query.shape)], domain=NN)[0]


@converts("causal_attention")
def _causal_attention(
    r: Recorder, query: Traced, key: Traced, value: Traced, num_heads: int, kv_heads: int, scale: float
) -> tuple[Traced, ...]:
    batch, rows, width = key.shape
    cache = Kind(key.dtype, (batch, kv_heads, rows, width // kv_heads))
    attributes = {"num_heads": num_heads, "kv_heads": kv_heads, "scale": scale}
    kinds = [Kind(query.dtype, query.shape), cache, cache]
    return r.node("CausalAttention", [query, key, value], attributes, like=kinds, domain=NN)


@converts("cached_attention")
def _cached_attention(
    r: Recorder,
    query: Traced,
    key: Traced,
    value: Traced,
    past_key: Traced,
    past_value: Traced,
    length: Traced,
    num_heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Traced, ...]:
    inputs = [query, key, value, past_key, past_value, length]
    attributes = {"num_heads": num_heads, "kv_heads": kv_heads, "scale": scale}
    kinds = [Kind(tensor.dtype, tensor.shape) for tensor in (query, past_key, past_value)]
    return r.node("CachedAttention", inputs, attributes, like=kinds, domain=NN)
