"""Whether one measure orders prompts as another does: Spearman's rank correlation with an interval over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from .statistics import Interval


def rank_correlation(pairs: Sequence[tuple[float, float]], *, confidence: float = 0.95, resamples: int = 10_000) -> Interval:
    """Spearman's correlation of two measures of the same prompts, with a percentile bootstrap interval over prompts.

    Equal values share their mean rank. A resample in which a measure is the same for all prompts is left out.

    Args:
        pairs: one for each prompt, all finite.
        confidence: of the interval.
        resamples: draws of the prompts.

    Raises:
        RouteError: fewer than three prompts, or a measure that is the same for all of them.

    """
    values = np.array(pairs, np.float64).reshape(-1, 2)
    if len(values) < 3 or not np.isfinite(values).all():
        raise RouteError(f"a rank correlation needs at least three prompts with finite values, got {len(values)}")
    found = _spearman(values[None])[0]
    if np.isnan(found):
        raise RouteError("a measure is the same for all prompts: there is no rank correlation")
    drawn = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    # A few at a time: every prompt is compared with every other.
    parts = [_spearman(values[some]) for some in np.array_split(drawn, max(1, resamples // 100))]
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(np.concatenate(parts), [tail, 1 - tail])
    return Interval(float(found), float(low), float(high), len(values), 1, confidence=confidence)


def _spearman(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Of [num_samples, num_prompts, 2]; NaN where a measure does not vary."""
    ranks = (values[:, :, None] > values[:, None]).sum(2) + ((values[:, :, None] == values[:, None]).sum(2) - 1) / 2
    ranks -= ranks.mean(1, keepdims=True)
    spread = np.sqrt((ranks**2).sum(1).prod(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations: npt.NDArray[np.float64] = ranks.prod(2).sum(1) / spread
    return correlations
