"""The error that users of plans and policies meet."""


class RouteError(ValueError):
    """A plan, a policy or a setting that cannot be honoured.

    The message names the field, the value and the limit. It is a `ValueError`, so vLLM's server answers 400.
    """
