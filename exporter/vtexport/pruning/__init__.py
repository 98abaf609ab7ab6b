"""Which visual tokens stay: one file a method, in PyTorch, the definition every engine is held to.

This module itself imports no PyTorch, so that plans can be read and listed without it.
"""

from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.method import Method
from vtexport.pruning.plan import PruningPlan, Stage
from vtexport.pruning.planning import adaptive_plans, dense_plan, make_plan, planner
from vtexport.pruning.registry import DEFAULT_METHOD, METHODS, methods_of
from vtexport.pruning.vision import VisionMethod

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "DecoderMethod",
    "Method",
    "PruningPlan",
    "Stage",
    "VisionMethod",
    "adaptive_plans",
    "dense_plan",
    "make_plan",
    "methods_of",
    "planner",
]
