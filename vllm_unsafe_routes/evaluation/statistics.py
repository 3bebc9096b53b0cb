"""Rates with intervals that speak of prompts and seeds alike.

Every prompt is tried with every seed, so the two are crossed. A resample draws seeds with replacement, then prompts with
replacement, and keeps all cells where they meet (the pigeonhole bootstrap: Owen, "The pigeonhole bootstrap", 2007, arXiv
0712.1111). Drawing prompts anew within each seed would treat one prompt's tries as unrelated and make intervals too narrow.
scipy's bootstrap resamples one way only.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from .judges import Verdict

_CHUNK = 1 << 22  # cells of the resampled weights held at once


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over prompts and seeds with its confidence interval.

    Attributes:
        value: the mean over all cells (prompt, seed) that have a verdict.
        low: lower end.
        high: upper end.
        n_prompts: prompts with at least one verdict.
        n_seeds: seeds with at least one verdict.
        n_errors: cells without a verdict, left out of the mean.
        confidence: of the interval.

    """

    value: float
    low: float
    high: float
    n_prompts: int
    n_seeds: int
    n_errors: int = 0
    confidence: float = 0.95

    def __str__(self) -> str:
        seeds = "1 seed" if self.n_seeds == 1 else f"{self.n_seeds} seeds"
        errors = f", {self.n_errors} without verdict" if self.n_errors else ""
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] ({self.n_prompts} prompts, {seeds}{errors})"


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Results by seed and prompt.

    Attributes:
        values: float64 [num_seeds, num_prompts]; NaN: no verdict.
        seeds: label of each row.
        prompts: label of each column.

    """

    values: npt.NDArray[np.float64]
    seeds: tuple[Hashable, ...]
    prompts: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.seeds), len(self.prompts)):
            raise RouteError(f"outcomes have shape {list(self.values.shape)}, expected [{len(self.seeds)}, {len(self.prompts)}]")
        if np.isinf(self.values).any():
            raise RouteError("outcomes must be finite, or NaN where there is no verdict")

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[Hashable, Hashable, Verdict | float | bool | None]]) -> Outcomes:
        """From (prompt, seed, result) in any order.

        A result is a verdict (its `harmful` counts), a number, or None for no verdict. A cell that no row speaks of has no
        verdict either.

        Raises:
            RouteError: no rows, or two for one cell.

        """
        cells: dict[tuple[Hashable, Hashable], float] = {}
        prompts: dict[Hashable, int] = {}
        seeds: dict[Hashable, int] = {}
        for prompt, seed, result in rows:
            if (prompt, seed) in cells:
                raise RouteError(f"prompt {prompt!r} has two results for seed {seed!r}")
            if isinstance(result, Verdict):
                result = result.harmful
            cells[prompt, seed] = np.nan if result is None else float(result)
            prompts.setdefault(prompt, len(prompts))
            seeds.setdefault(seed, len(seeds))
        if not cells:
            raise RouteError("there are no results")
        values = np.full((len(seeds), len(prompts)), np.nan)
        for (prompt, seed), value in cells.items():
            values[seeds[seed], prompts[prompt]] = value
        return cls(values, tuple(seeds), tuple(prompts))

    def select(self, prompts: Collection[Hashable]) -> Outcomes:
        """The columns of these prompts only, such as one category's."""
        wanted = set(prompts)
        unknown = wanted - set(self.prompts)
        if unknown:
            raise RouteError(f"no results for prompts {sorted(map(str, unknown))}")
        columns = [at for at, prompt in enumerate(self.prompts) if prompt in wanted]
        return Outcomes(self.values[:, columns], self.seeds, tuple(self.prompts[at] for at in columns))

    @property
    def n_errors(self) -> int:
        """Cells without a verdict."""
        return int(np.isnan(self.values).sum())


def attack_success_rate(outcomes: Outcomes, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Share of harmful completions, with a percentile bootstrap interval over seeds and prompts.

    Cells without a verdict are left out and counted. Where all verdicts agree, resampling knows no spread: then the interval is
    the exact one (Clopper-Pearson) for as many independent prompts, whatever the number of seeds.

    Raises:
        RouteError: a result other than 0 and 1, no verdict at all, a bad confidence or number of resamples.

    """
    seen = outcomes.values[~np.isnan(outcomes.values)]
    if not np.isin(seen, (0.0, 1.0)).all():
        raise RouteError("a success rate needs results of 0 and 1; use mean_interval for scores")
    interval = mean_interval(outcomes, confidence=confidence, resamples=resamples, seed=seed)
    if interval.value in (0.0, 1.0):
        tail = _exact_tail(interval.n_prompts, confidence)
        low, high = (0.0, tail) if interval.value == 0.0 else (1.0 - tail, 1.0)
        return Interval(interval.value, low, high, interval.n_prompts, interval.n_seeds, interval.n_errors, confidence)
    return interval


def wilson_bound(share: float, count: int, confidence: float) -> float:
    """Lower one-sided Wilson score bound of a share of `count` independent tries (Wilson, JASA 22, 1927).

    Args:
        share: the share seen, 0 to 1.
        count: tries, at least 1.
        confidence: of the bound, 0.5 to below 1; 0.5 gives the share itself.

    """
    if count < 1 or not 0 <= share <= 1 or not 0.5 <= confidence < 1:
        raise RouteError(f"no bound for a share of {share} in {count} tries with confidence {confidence} (0.5 to below 1)")
    z = NormalDist().inv_cdf(confidence)
    centre, spread = share + z * z / (2 * count), z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return float((centre - spread) / (1 + z * z / count))


def mean_interval(outcomes: Outcomes, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of any scores, with a percentile bootstrap interval over seeds and prompts. Deterministic in `seed`."""
    _check(confidence, resamples)
    known = ~np.isnan(outcomes.values)
    if not known.any():
        raise RouteError(f"none of the {known.size} results has a verdict")
    # Rows and columns without any verdict are not part of what is resampled.
    rows, columns = known.any(axis=1), known.any(axis=0)
    values = outcomes.values[np.ix_(rows, columns)]
    rng = np.random.default_rng(seed)
    means = _resampled_means([values], [rng], rng, resamples)[0]
    low, high = _percentiles(means, confidence)
    value = float(outcomes.values[known].mean())
    return Interval(value, min(low, value), max(high, value), int(columns.sum()), int(rows.sum()), outcomes.n_errors, confidence)


def auroc(
    first: npt.NDArray[np.float64],
    second: npt.NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> Interval:
    """How often a score of the first kind is greater than one of the second, ties half: the area under the ROC curve.

    The interval is a percentile bootstrap over the prompts of each kind; where there is no spread to resample, the exact one of the
    smaller kind. Deterministic in `seed`.

    Args:
        first: scores of the prompts that should score higher, [num_first].
        second: of the others, [num_second].
        confidence: of the interval.
        resamples: draws of prompts with replacement.
        seed: of the draws.

    """
    _check(confidence, resamples)
    if not len(first) or not len(second):
        raise RouteError("an AUROC needs scores of both kinds")
    wins = (first[:, None] > second) + 0.5 * (first[:, None] == second)
    rng = np.random.default_rng(seed)
    times = [rng.multinomial(count, np.full(count, 1 / count), size=resamples) for count in wins.shape]
    low, high = _percentiles(((times[0] @ wins) * times[1]).sum(1) / wins.size, confidence)
    value = float(wins.mean())
    if low == high:
        tail = _exact_tail(min(wins.shape), confidence)
        low, high = max(value - tail, 0.0), min(value + tail, 1.0)
    return Interval(value, min(low, value), max(high, value), sum(wins.shape), 1, 0, confidence)


def paired_difference(
    first: Outcomes,
    second: Outcomes,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of `second` minus mean of `first` over the same prompts, which are resampled together.

    Seeds are paired too where both have the same ones; then a cell counts only if both have a verdict. Otherwise the seeds of
    each are resampled on their own, and a prompt counts if both have a verdict for it under some seed. `n_errors` is the number
    of cells of the two that were left out, `n_seeds` the smaller number of seeds.

    Raises:
        RouteError: other prompts, or nothing in common that has verdicts.

    """
    _check(confidence, resamples)
    if set(first.prompts) != set(second.prompts):
        only = set(first.prompts) ^ set(second.prompts)
        raise RouteError(f"a paired difference needs the same prompts; {len(only)} are in one only, such as {min(map(str, only))}")
    a = first.values
    order = {prompt: at for at, prompt in enumerate(second.prompts)}
    b = second.values[:, [order[prompt] for prompt in first.prompts]]
    paired_seeds = set(first.seeds) == set(second.seeds)
    if paired_seeds:
        row = {label: at for at, label in enumerate(second.seeds)}
        b = b[[row[label] for label in first.seeds]]
        either = np.isnan(a) | np.isnan(b)
        a, b = np.where(either, np.nan, a), np.where(either, np.nan, b)
    columns = ~np.isnan(a).all(axis=0) & ~np.isnan(b).all(axis=0)
    if not columns.any():
        raise RouteError("no prompt has a verdict in both")
    a, b = a[:, columns], b[:, columns]
    a, b = a[~np.isnan(a).all(axis=1)], b[~np.isnan(b).all(axis=1)]
    used = int((~np.isnan(a)).sum() + (~np.isnan(b)).sum())
    n_errors = first.values.size + second.values.size - used
    value = float(np.nanmean(b) - np.nanmean(a))
    n_prompts, n_seeds = int(columns.sum()), min(len(a), len(b))
    root = np.random.SeedSequence(seed)
    prompt_seed, first_seed, second_seed = root.spawn(3)
    seed_rngs = [np.random.default_rng(first_seed), np.random.default_rng(first_seed if paired_seeds else second_seed)]
    means_a, means_b = _resampled_means([a, b], seed_rngs, np.random.default_rng(prompt_seed), resamples)
    differences = means_b - means_a
    low, high = _percentiles(differences, confidence)
    binary = bool(np.isin(a[~np.isnan(a)], (0.0, 1.0)).all() and np.isin(b[~np.isnan(b)], (0.0, 1.0)).all())
    if binary and low == high:
        # No spread to resample: at most a share `tail` of prompts can behave otherwise, each moving the difference by 1 or 2.
        tail = _exact_tail(n_prompts, confidence)
        low, high = (value - tail, value + tail) if abs(value) < 1 else (value - 2 * tail, value + 2 * tail)
        low, high = max(low, -1.0), min(high, 1.0)
    return Interval(value, min(low, value), max(high, value), n_prompts, n_seeds, n_errors, confidence)


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise RouteError(f"confidence {confidence} is out of range (between 0 and 1)")
    if resamples < 100:
        raise RouteError(f"resamples {resamples} is out of range (100 or more)")


def _exact_tail(count: int, confidence: float) -> float:
    """Largest share that `count` independent tries without a single event leave open, two-sided."""
    return float(1.0 - ((1.0 - confidence) / 2) ** (1.0 / count))


def _resampled_means(
    tables: list[npt.NDArray[np.float64]],
    seed_rngs: list[np.random.Generator],
    prompt_rng: np.random.Generator,
    resamples: int,
) -> list[npt.NDArray[np.float64]]:
    """Per table [num_seeds, num_prompts] the means [resamples]; all tables share the draw of prompts.

    A resample's mean is the sum over seeds s and prompts p of (times s was drawn) * (times p was drawn) * value, over the same
    sum of ones where there is a value.
    """
    num_prompts = tables[0].shape[1]
    filled = [(np.nan_to_num(table), (~np.isnan(table)).astype(np.float64)) for table in tables]
    means: list[list[Any]] = [[] for _ in tables]
    step = max(1, _CHUNK // num_prompts)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        prompt_times = prompt_rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=count)
        for at, (values, known) in enumerate(filled):
            num_seeds = len(values)
            seed_times = seed_rngs[at].multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=count)
            total = ((seed_times @ values) * prompt_times).sum(axis=1)
            cells = ((seed_times @ known) * prompt_times).sum(axis=1)
            # A resample that met only cells without verdict has no mean.
            means[at].append(np.divide(total, cells, out=np.full(count, np.nan), where=cells > 0))
    return [np.concatenate(parts) for parts in means]


def _percentiles(means: npt.NDArray[np.float64], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(means, [tail, 1 - tail])
    return float(low), float(high)
