"""Which visual tokens stay. Each method is one file of PyTorch code, which defines what every engine must compute.

Importing this package does not import PyTorch, so that plans can be read and listed without it.
"""

from vtexport.pruning.decoder import DecoderMethod
from vtexport.pruning.geometry import Geometry
from vtexport.pruning.method import Method, MethodChoice
from vtexport.pruning.plan import PruningPlan, Stage
from vtexport.pruning.planning import adaptive_plans, dense_plan, make_plan
from vtexport.pruning.registry import DEFAULT_METHOD, METHODS, choose, parts_of
from vtexport.pruning.selection import selection_plan
from vtexport.pruning.vision import VisionMethod

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "DecoderMethod",
    "Geometry",
    "Method",
    "MethodChoice",
    "PruningPlan",
    "Stage",
    "VisionMethod",
    "adaptive_plans",
    "choose",
    "dense_plan",
    "make_plan",
    "parts_of",
    "selection_plan",
]
