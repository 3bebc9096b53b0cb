"""The error that users of plans and policies meet."""

# Why a plan is refused, in one word: the label of a metric. The message says the rest.
REASONS = ("invalid", "policy", "table", "model", "prompt", "disabled")


class RouteError(ValueError):
    """A plan, a policy or a setting that cannot be honoured.

    The message names the field, the value and the limit. It is a `ValueError`, so vLLM's server answers 400.

    Args:
        message: for the user.
        reason: one of `REASONS`.

    """

    def __init__(self, message: str, reason: str = "invalid") -> None:
        super().__init__(message)
        self.reason = reason


class EngineEnded(RouteError):
    """The process of an engine has ended; what was finished before is kept."""
