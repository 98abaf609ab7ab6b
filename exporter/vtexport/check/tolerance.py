"""How far an engine may be from the reference, by the precision in which it computes.

A precision is a dtype, or `ROUNDED`. fp32 differs by the order of summation only; fp16 has 11 significant bits, bf16 and
blocks of 8 bits eight, and errors add up over the layers.
"""

from __future__ import annotations

#: an engine that rounds activations to 8 bits (`vtexport.targets.quantize.Scheme.rounds_activations`)
ROUNDED = "8-bit activations"
#: largest absolute error of a logit, as a share of the largest absolute logit
TOLERANCE = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1, ROUNDED: 3e-1}
#: largest relative distance from the K-th score at which lower precision may swap two tokens
SCORE_SLACK = {"fp32": 0.0, "fp16": 0.1, "bf16": 0.5}
#: largest relative error of the spread of CLS's attention
SPREAD_SLACK = {"fp32": 1e-4, "fp16": 3e-2, "bf16": 2e-1, ROUNDED: 2e-1}


def advice(precision: str) -> str:
    """What to do about an engine that is farther off."""
    if precision == ROUNDED:
        return "8 bits are too few for this model's activations, so build it without --quantize"
    return "please report this model"
