"""Full control over expert routing in MoE models inside vLLM.

Start with `RoutePlan` (per request) and `RoutePolicy` (engine-wide); `plan.py` names the steps from a request to the kernel.
"""

from .errors import RouteError
from .plan import Directive, RoutePlan
from .policy import LayerPolicy, RoutePolicy
from .receipt import Receipt, receipt_of
from .shape import ModelShape

__all__ = ["Directive", "LayerPolicy", "ModelShape", "Receipt", "RouteError", "RoutePlan", "RoutePolicy", "receipt_of"]
__version__ = "0.1.0"
