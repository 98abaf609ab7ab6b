"""The CUDA kernels through PyTorch, on a GPU: the ops' own arithmetic, streams, CUDA graphs, repeated bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.pruning.test_ops import SCALES, beyond_fp16
from vtexport.native import kernels as native
from vtexport.pruning import ops, plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not native.available("cuda"), reason="needs the CUDA kernels: install vtexport where nvcc is"),
]
# By the dtype of an output: products and sums are fp32 throughout, so that another order of summation may change the last
# digits of fp32, and of the others their last bit.
RELATIVE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
#: batch, heads, key heads, rows, keys, head size, visual tokens, width: one odd, one of LLaVA-1.5-7B
SHAPES = [(2, 6, 2, 21, 150, 20, 90, 33), (1, 32, 32, 64, 640, 128, 576, 4096)]


def stage(shape: tuple[int, ...], kind: torch.dtype) -> dict[str, tuple[object, ...]]:
    """Arguments for the ops of one pruning stage, on the GPU."""
    batch, heads, groups, rows, keys, size, visual, width = shape
    made = torch.Generator("cuda").manual_seed(0)

    def random(*extents: int) -> torch.Tensor:
        return torch.randn(extents, generator=made, device="cuda").to(kind)

    counts = torch.rand(batch, rows, generator=made, device="cuda") < 0.7
    places = torch.where(counts, torch.arange(keys - rows, keys, device="cuda"), -1)
    start = torch.full((batch,), 5, device="cuda")
    rating = (random(batch, heads, rows, size), random(batch, groups, keys, size), places, start)
    divisor = 1 + torch.rand(batch, rows, visual, generator=made, device="cuda")
    hidden, score = random(batch, visual, width), torch.rand(batch, visual, generator=made, device="cuda")
    rank = score.argsort(dim=1).argsort(dim=1).int()
    keep = visual // 3
    pool = int(0.3 * (visual - keep)) + 1
    return {
        "token_score": (*rating, visual, size**-0.5),
        "token_score_heads": (*rating, divisor, visual, size**-0.5, heads // 2),
        "token_select": (hidden, score, keep),
        "token_recycle": (hidden, rank, keep, pool, pool // 10 + 1, False),
    }


@pytest.mark.parametrize("kind", RELATIVE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["token_score", "token_score_heads", "token_select", "token_recycle"])
def test_kernels_say_what_pytorch_says_and_repeat_it(name: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    arguments = stage(shape, kind)[name]
    found, expected = getattr(ops, name)(*arguments), getattr(plain, name)(*arguments)
    again = getattr(ops, name)(*arguments)
    for one, other, repeated in zip(
        *(x if isinstance(x, tuple) else (x,) for x in (found, expected, again)), strict=True
    ):
        assert torch.equal(one, repeated)
        if one.dtype == torch.int32:
            assert torch.equal(one, other)
        else:
            torch.testing.assert_close(one, other, rtol=RELATIVE[one.dtype], atol=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_products_beyond_the_range_of_fp16_make_the_right_scores(scale: float) -> None:
    case, expected = beyond_fp16(scale)
    found = ops.token_score(*(tensor.cuda() for tensor in case.tensors()), case.count, scale)
    np.testing.assert_allclose(found.cpu(), expected, rtol=1e-2, atol=1e-7)


def test_kernels_run_on_the_current_stream_and_in_a_cuda_graph() -> None:
    arguments = stage(SHAPES[1], torch.bfloat16)
    expected = {name: getattr(ops, name)(*given) for name, given in arguments.items()}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = {name: getattr(ops, name)(*given) for name, given in arguments.items()}
    graph.replay()
    torch.cuda.synchronize()
    for name, outputs in expected.items():
        torch.testing.assert_close(captured[name], outputs, rtol=0, atol=0, equal_nan=True)
