"""What Inspect finds by the entry point `inspect_ai`: importing the modules registers what they define."""

from .provider import RoutedServer
from .solver import fsour
from .tasks import advbench, answered, harmbench, jailbreakbench

__all__ = ["RoutedServer", "advbench", "answered", "fsour", "harmbench", "jailbreakbench"]
