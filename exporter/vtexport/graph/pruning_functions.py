"""ONNX function bodies of domain `vtexport`; see `vtexport.graph.functions`, contracts in `vtexport.pruning.ops`.

A number of tokens is given as a vector of that length, whose values are never read: a length may differ between the
optimisation profiles of one TensorRT engine, and the shapes of outputs follow from it.
"""

# The bodies are onnxscript: Python syntax that is never run as Python.
# mypy: ignore-errors

from typing import TypeVar, Union

from onnxscript import FLOAT, FLOAT16, INT32, INT64, script
from onnxscript import opset18 as op
from onnxscript.values import Opset

from vtexport.graph.domains import DOMAIN_VERSION, PRUNING

pruning = Opset(PRUNING, DOMAIN_VERSION)
T = TypeVar("T", bound=Union[FLOAT, FLOAT16])  # noqa: UP007 - onnxscript reads typing.Union only


@script(pruning, default_opset=op)
def TokenScore(query: T, key: T, places: INT64, start: INT64, count: INT32, scale: float) -> FLOAT:
    groups = op.Shape(key, start=1, end=2)
    width = op.Shape(query, start=3, end=4)
    zero = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    scaled = op.Cast(query, to=FLOAT.dtype) * op.Constant(value_float=scale)
    # Query heads that share a key head are neighbours, so their rows form one block.
    grouped = op.Reshape(scaled, op.Concat(zero, groups, rest, width, axis=0))
    columns = op.Transpose(op.Cast(key, to=FLOAT.dtype), perm=[0, 1, 3, 2])
    keys = op.Shape(key, start=2, end=3)
    by_head = op.Concat(zero, op.Shape(query, start=1, end=3), keys, axis=0)
    logits = op.Reshape(op.MatMul(grouped, columns), by_head)
    number = op.Range(op.Constant(value_int=0), op.Squeeze(keys), op.Constant(value_int=1))
    # A row that does not count sees the first key, so that its attention is a number.
    place = op.Max(places, op.Constant(value_int=0))
    seen = op.LessOrEqual(number, op.Unsqueeze(place, op.Constant(value_ints=[1, 3])))
    masked = op.Where(seen, logits, op.Constant(value_float=float("-inf")))
    attention = op.ReduceMean(op.Softmax(masked, axis=-1), one, keepdims=0)
    counted = op.Cast(op.GreaterOrEqual(places, op.Constant(value_int=0)), to=FLOAT.dtype)
    total = op.Max(op.ReduceSum(counted, one, keepdims=1), op.Constant(value_float=1.0))
    share = op.Unsqueeze(counted / total, one)
    score = op.Squeeze(op.MatMul(share, attention), one)
    visual = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(count)), op.Constant(value_int=1))
    return op.GatherElements(score, op.Unsqueeze(start, one) + visual, axis=1)


@script(pruning, default_opset=op)
def TokenScoreHeads(
    query: T,
    key: T,
    places: INT64,
    start: INT64,
    divisor: FLOAT,
    count: INT32,
    scale: float,
    heads: int,
) -> FLOAT:
    groups = op.Shape(key, start=1, end=2)
    width = op.Shape(query, start=3, end=4)
    zero = op.Constant(value_ints=[0])
    rest = op.Constant(value_ints=[-1])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    scaled = op.Cast(query, to=FLOAT.dtype) * op.Constant(value_float=scale)
    grouped = op.Reshape(scaled, op.Concat(zero, groups, rest, width, axis=0))
    columns = op.Transpose(op.Cast(key, to=FLOAT.dtype), perm=[0, 1, 3, 2])
    keys = op.Shape(key, start=2, end=3)
    leading = op.Shape(query, start=0, end=3)
    logits = op.Reshape(op.MatMul(grouped, columns), op.Concat(leading, keys, axis=0))
    number = op.Range(op.Constant(value_int=0), op.Squeeze(keys), op.Constant(value_int=1))
    # A row that does not count sees the first key, so that its attention is a number.
    place = op.Max(places, op.Constant(value_int=0))
    seen = op.LessOrEqual(number, op.Unsqueeze(place, op.Constant(value_ints=[1, 3])))
    attention = op.Softmax(op.Where(seen, logits, op.Constant(value_float=float("-inf"))), axis=-1)
    visual = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(count)), op.Constant(value_int=1))
    places_of = op.Unsqueeze(op.Unsqueeze(start, one) + visual, op.Constant(value_ints=[1, 2]))
    index = op.Expand(places_of, op.Concat(leading, op.Shape(count), axis=0))
    weighted = op.GatherElements(attention, index, axis=3) / op.Unsqueeze(divisor, one)
    counted = op.Cast(op.GreaterOrEqual(places, op.Constant(value_int=0)), to=FLOAT.dtype)
    total = op.Max(op.ReduceSum(counted, one, keepdims=1), op.Constant(value_float=1.0))
    share = op.Unsqueeze(counted / total, op.Constant(value_ints=[1, 2]))
    by_head = op.Squeeze(op.MatMul(share, weighted), two)
    sums = op.ReduceSum(by_head, two, keepdims=0)
    mine = op.Unsqueeze(sums, two)
    other = op.Unsqueeze(sums, one)
    head = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(query, start=1, end=2)), op.Constant(value_int=1))
    before = op.Less(op.Unsqueeze(head, zero), op.Unsqueeze(head, one))
    beaten = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), before))
    rank = op.ReduceSum(op.Cast(beaten, to=FLOAT.dtype), two, keepdims=0)
    chosen = op.Less(rank, op.Cast(op.Constant(value_int=heads), to=FLOAT.dtype))
    picked = by_head * op.Unsqueeze(op.Cast(chosen, to=FLOAT.dtype), two)
    return op.ReduceSum(picked, one, keepdims=0) / op.Cast(op.Constant(value_int=heads), to=FLOAT.dtype)


@script(pruning, default_opset=op)
def TokenSelect(hidden: T, score: FLOAT, keep: INT32) -> tuple[T, INT32, INT32]:
    # Rank of each token: how many beat it, by score or, at equal score, by a lower index.
    clean = op.Where(op.IsNaN(score), op.Constant(value_float=float("-inf")), score)
    mine = op.Unsqueeze(clean, op.Constant(value_ints=[2]))
    other = op.Unsqueeze(clean, op.Constant(value_ints=[1]))
    total = op.Squeeze(op.Shape(score, start=1, end=2))
    place = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
    before = op.Less(op.Unsqueeze(place, op.Constant(value_ints=[0])), op.Unsqueeze(place, op.Constant(value_ints=[1])))
    beaten = op.Or(op.Greater(other, mine), op.And(op.Equal(other, mine), before))
    rank = op.ReduceSum(op.Cast(beaten, to=FLOAT.dtype), op.Constant(value_ints=[2]), keepdims=0)
    # Kept tokens get keys 0, -1, -2 … by place, and others lower keys, so TopK lists the kept tokens in order.
    number = op.Cast(place, to=FLOAT.dtype)
    extent = op.Shape(keep)
    kept = op.Less(rank, op.Cast(extent, to=FLOAT.dtype))
    key = op.Where(kept, op.Neg(number), op.Neg(number + op.Cast(total, to=FLOAT.dtype)))
    _keys, index = op.TopK(key, extent, axis=1, largest=1, sorted=1)
    chosen = op.GatherND(hidden, op.Unsqueeze(index, op.Constant(value_ints=[2])), batch_dims=1)
    return chosen, op.Cast(index, to=6), op.Cast(rank, to=6)


@script(pruning, default_opset=op)
def TokenRecycle(
    hidden: T, rank: INT32, keep: INT32, pool: INT32, clusters: INT32, paper: int
) -> tuple[T, INT32, INT32]:
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    both = op.Constant(value_ints=[1, 2])
    minus_infinity = op.Constant(value_float=float("-inf"))
    infinity = op.Constant(value_float=float("inf"))
    pool_size = op.Shape(pool)
    cluster_size = op.Shape(clusters)
    pool_number = op.Squeeze(pool_size)
    cluster_count = op.Squeeze(cluster_size)
    kept = op.Cast(op.Shape(keep), to=6)
    # The pool: ranks keep … keep + pool - 1, listed by place as in TokenSelect.
    total = op.Squeeze(op.Shape(rank, start=1, end=2))
    place = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
    last = kept + op.Cast(pool_size, to=6)
    pooled = op.And(op.GreaterOrEqual(rank, kept), op.Less(rank, last))
    number = op.Cast(place, to=FLOAT.dtype)
    key = op.Where(pooled, op.Neg(number), op.Neg(number + op.Cast(total, to=FLOAT.dtype)))
    _keys, index = op.TopK(key, pool_size, axis=1, largest=1, sorted=1)
    x = op.Cast(op.GatherND(hidden, op.Unsqueeze(index, two), batch_dims=1), to=FLOAT.dtype)
    # Squared distances over the width. Centred on their mean, the products in the expanded form lose fewer digits.
    centred = x - op.ReduceMean(x, one, keepdims=1)
    norm = op.ReduceSum(centred * centred, two, keepdims=1)
    products = op.MatMul(centred, op.Transpose(centred, perm=[0, 2, 1]))
    # Two tokens that are each other's nearest neighbours tie in density. A matrix that is not symmetric to the last bit
    # would break the tie.
    doubled = products + op.Transpose(products, perm=[0, 2, 1])
    expanded = norm + op.Transpose(norm, perm=[0, 2, 1]) - doubled
    width = op.Cast(op.Shape(hidden, start=2, end=3), to=FLOAT.dtype)
    within = op.Range(op.Constant(value_int=0), pool_number, op.Constant(value_int=1))
    row = op.Unsqueeze(within, one)
    column = op.Unsqueeze(within, zero)
    itself = op.Equal(row, column)
    squared = op.Where(itself, op.Constant(value_float=0.0), op.Max(expanded / width, op.Constant(value_float=0.0)))
    # Only the values of this TopK are read, so the order of equal ones does not matter.
    nearest, _places = op.TopK(squared, cluster_size, axis=2, largest=0, sorted=1)
    density = op.Neg(op.ReduceMean(nearest, two, keepdims=0))
    own_density = op.Unsqueeze(density, two)
    their_density = op.Unsqueeze(density, one)
    earlier = op.Less(column, row)
    denser = op.Or(op.Greater(their_density, own_density), op.And(op.Equal(their_density, own_density), earlier))
    farthest = op.ReduceMax(squared, both, keepdims=1)
    delta = op.ReduceMin(op.Where(denser, squared, farthest), two, keepdims=0)
    # The later token of a pair is the higher peak only if its delta · density is greater, so that equal peaks fall to
    # the lower place. Peaks are compared through the ratio of densities, which is exactly one if these are equal.
    # Logarithms would not do: runtimes may give equal numbers different ones (in a vectorised loop and behind its end).
    two_times = op.Constant(value_float=2.0)
    bound = op.Constant(value_float=80.0)
    ratio = op.Clip(two_times * (own_density - their_density), op.Neg(bound), bound)
    own_delta = op.Unsqueeze(delta, two)
    their_delta = op.Unsqueeze(delta, one)
    they_win_late = op.Greater(their_delta, own_delta * op.Exp(ratio))
    i_win_late = op.Greater(own_delta, their_delta * op.Exp(op.Neg(ratio)))
    later = op.Greater(column, row)
    higher = op.Or(op.And(later, they_win_late), op.And(earlier, op.Not(i_win_late)))
    peak_rank = op.ReduceSum(op.Cast(higher, to=FLOAT.dtype), two, keepdims=0)
    # Rounding can give two peaks one rank; the place makes the keys distinct.
    centre_key = peak_rank * op.Cast(pool_number, to=FLOAT.dtype) + op.Cast(within, to=FLOAT.dtype)
    _centre_keys, centre = op.TopK(centre_key, cluster_size, axis=1, largest=0, sorted=1)
    # Each token joins the nearest centre, and a centre joins itself.
    length = op.Sqrt(op.ReduceSum(x * x, two, keepdims=1))
    unit = x / op.Max(length, op.Constant(value_float=1e-12))
    cosine = op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))
    as_paper = op.Cast(op.Constant(value_int=paper), to=9)
    near = op.Where(as_paper, cosine, op.Neg(squared))
    nearness = op.Where(itself, infinity, op.Where(op.IsNaN(near), minus_infinity, near))
    # [B, c, m]. The matrix is symmetric, so its rows serve as its columns.
    to_centres = op.GatherND(nearness, op.Unsqueeze(centre, two), batch_dims=1)
    best = op.Equal(to_centres, op.ReduceMax(to_centres, one, keepdims=1))
    cluster_number = op.Range(op.Constant(value_int=0), cluster_count, op.Constant(value_int=1))
    numbered = op.Unsqueeze(op.Cast(cluster_number, to=FLOAT.dtype), one)
    candidates = op.Where(best, numbered, op.Cast(cluster_count, to=FLOAT.dtype))
    joined = op.ReduceMin(candidates, one, keepdims=1)
    members = op.Cast(op.Equal(joined, numbered), to=FLOAT.dtype)
    size = op.Where(as_paper, op.Constant(value_float=1.0), op.ReduceSum(members, two, keepdims=1))
    merged = op.CastLike(op.MatMul(members, x) / size, hidden)
    centres = op.Cast(op.GatherElements(index, centre, axis=1), to=6)
    none = op.Expand(op.Cast(op.Constant(value_int=-1), to=6), op.Shape(rank))
    cluster = op.ScatterElements(none, index, op.Cast(op.Squeeze(joined, one), to=6), axis=1)
    return merged, centres, cluster


PRUNING_FUNCTIONS = (TokenScore, TokenScoreHeads, TokenSelect, TokenRecycle)
