"""FLOPs against the papers' own formula, and against torch's counter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.checkpoints import MICRO
from tests.reference import llava
from vtexport.models import read_spec
from vtexport.pruning import Geometry, dense_plan, make_plan, selection_plan
from vtexport.pruning.flops import plan_flops, selection_flops


def micro_plan(method: str, keep: float):
    spec = read_spec(MICRO)
    return spec, make_plan(method, Geometry(144, spec.decoder.num_layers), keep=keep)


def test_decoder_layers_follow_the_papers_formula_without_grouping(tiny_checkpoint: Path) -> None:
    spec = read_spec(tiny_checkpoint)
    d = spec.decoder
    plan = make_plan("fastervlm", Geometry(25, d.num_layers), keep=0.4)
    n = plan.vision_tokens + 11
    # 4nd² + 2n²d + 3ndm multiply-adds a layer; grouped keys and values save a share of the 4nd².
    saved = 2 * n * d.hidden_size * d.head_size * (d.num_heads - d.num_kv_heads)
    layer = 4 * n * d.hidden_size**2 - saved + 2 * n * n * d.hidden_size + 3 * n * d.hidden_size * d.intermediate_size
    head = d.hidden_size * d.vocab_size
    assert plan_flops(spec, plan, 11).prefill == 2 * (d.num_layers * layer + head)


def test_the_whole_first_token_is_what_torch_counts() -> None:
    spec, plan = micro_plan("dense", 1.0)
    model = llava.load(MICRO)
    text = 9
    ids = torch.tensor([[1] * 4 + [4] * 144 + [5] * (text - 4)])
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=ids, pixel_values=torch.zeros(1, 3, 96, 96), logits_to_keep=1)
    # transformers also runs the tower's last layer, whose output LLaVA does not read.
    v = spec.vision
    rows = v.num_patches + 1
    extra = 2 * rows * (4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size)
    extra += 4 * rows * rows * v.hidden_size
    counted = counter.get_total_flops() - extra
    assert abs(plan_flops(spec, plan, text).first_token / counted - 1) < 0.01


def test_pruning_makes_it_cheaper_in_the_decoder_only() -> None:
    spec, dense = micro_plan("dense", 1.0)
    _, pruned = micro_plan("fastervlm", 0.25)
    full, less = plan_flops(spec, dense), plan_flops(spec, pruned)
    assert less.prefill < 0.5 * full.prefill
    assert less.decode < full.decode
    assert 0.95 < less.vision / full.vision < 1


def test_each_layer_is_paid_for_the_tokens_that_enter_it() -> None:
    spec, plan = micro_plan("sparsevlm", 0.33)
    counts = set(plan.per_layer)
    assert len(counts) > 1
    # A schedule costs what uniform plans of its layers' own counts would, layer by layer, and a little scoring.
    text = 13
    layers = {n: plan_flops(spec, make_plan("fastervlm", Geometry(144, 12), keep=n / 144), text) for n in counts}
    head = 2 * spec.decoder.hidden_size * spec.decoder.vocab_size
    expected = sum((layers[n].prefill - head) / 12 for n in plan.per_layer) + head
    extra = plan_flops(spec, plan, text).prefill - expected
    assert 0 < extra < 0.01 * expected


def test_choosing_costs_the_layers_before_the_one_that_rates_and_that_ones_queries_and_keys() -> None:
    spec, plan = micro_plan("fastv", 0.25)
    d, text, costs = spec.decoder, 13, []
    for layer in (0, 3):
        made = make_plan("fastv", Geometry(144, d.num_layers), keep=0.5, options={"layers": str(layer)})
        costs.append(selection_flops(spec, selection_plan(made), text))
    head = 2 * d.hidden_size * d.vocab_size
    whole = (plan_flops(spec, dense_plan(plan), text).prefill - head) / d.num_layers
    assert costs[1] - costs[0] == 3 * whole
    # One row's queries and all rows' keys, then that row against all keys.
    rows = 144 + text
    wide, narrow = d.num_heads * d.head_size, d.num_kv_heads * d.head_size
    assert costs[0] == 2 * d.hidden_size * (wide + rows * narrow) + 2 * rows * wide
    assert selection_flops(spec, selection_plan(plan), text) == costs[0] + whole
