"""Full control over expert routing in MoE models inside vLLM.

Start with `RoutePlan` (per request), `RoutePolicy` (engine-wide) and `RouteScorer` (many plans at once); `plan.py` names the steps
from a request to the kernel.
"""

from .directive import Directive
from .errors import RouteError
from .plan import RoutePlan
from .policy import LayerPolicy, RoutePolicy
from .receipt import Receipt, receipt_of, receipts_of
from .search.scorer import RouteScorer
from .shape import ModelShape

__all__ = [
    "Directive",
    "LayerPolicy",
    "ModelShape",
    "Receipt",
    "RouteError",
    "RoutePlan",
    "RoutePolicy",
    "RouteScorer",
    "receipt_of",
    "receipts_of",
]
__version__ = "0.1.0"
