"""RouteScan (arXiv 2605.24817): which kind a prompt is of, from the experts that its tokens are routed to.

The features are the prompt's expert load: per MoE layer and expert the share of its tokens. The probe is a logistic regression over
the standardised features, with an L2 penalty. What it is worth is measured on scores of prompts that the probe in question was not
fitted on (cross-validation); the threshold is chosen on the same scores.

    first, second = run_search(backend, expert_load(backend, harmful)), run_search(backend, expert_load(backend, harmless))
    probe = fit_probe(backend.shape, first, second)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import RouteError
from ..evaluation.statistics import auroc
from ..route_probe import RouteProbe
from ..shape import ModelShape
from .backend import Backend, Search
from .usage import usage

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ProbeSettings:
    """How a probe is fitted.

    Attributes:
        penalty: L2 penalty on the weights of the standardised features, see `logistic_regression`.
        folds: parts of the cross-validation.
        false_positives: share of the second kind's prompts that the threshold may flag.
        seed: of the parts and of the interval.

    """

    penalty: float = 0.01
    folds: int = 5
    false_positives: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, low, high in (("penalty", self.penalty, 1e-6, 1e6), ("false_positives", self.false_positives, 0.0, 1.0)):
            if not low <= value <= high:
                raise RouteError(f"{name} {value} is out of range ({low:g}-{high:g})")
        if self.folds < 2:
            raise RouteError(f"folds {self.folds} is out of range (2 or more)")


def expert_load(backend: Backend, prompts: Sequence[Sequence[int]]) -> Search[Floats]:
    """Share of each prompt's tokens that each expert gets, float64 [num_prompts, num_moe_layers, num_experts]."""
    found = yield from usage(backend, prompts)
    load: Floats = found.counts / found.tokens[:, None, None]
    return load


def fit_probe(shape: ModelShape, first: Floats, second: Floats, settings: ProbeSettings | None = None) -> RouteProbe:
    """A probe that scores prompts of the first kind higher.

    Args:
        shape: the model's.
        first: of `expert_load`, the prompts to be flagged.
        second: the others.
        settings: how.

    Raises:
        RouteError: fewer prompts of a kind than folds.

    """
    settings = settings or ProbeSettings()
    features = np.concatenate([first, second]).reshape(len(first) + len(second), -1)
    labels = np.repeat([1.0, 0.0], [len(first), len(second)])
    scores = _held_out_scores(features, labels, settings)
    area = auroc(scores[labels == 1], scores[labels == 0], seed=settings.seed)
    threshold = float(np.quantile(scores[labels == 0], 1 - settings.false_positives, method="higher"))
    weights, bias = logistic_regression(features, labels, settings.penalty)
    measured = {
        "auroc": [area.value, area.low, area.high],
        "prompts": [len(first), len(second)],
        "flagged": [float((scores[labels == kind] > threshold).mean()) for kind in (1, 0)],
        "folds": settings.folds,
        "penalty": settings.penalty,
    }
    return RouteProbe(shape.fingerprint, tuple(shape.moe_layers), weights.reshape(first.shape[1:]), bias, threshold, measured)


def _held_out_scores(features: Floats, labels: Floats, settings: ProbeSettings) -> Floats:
    """Each prompt's score by a probe that was fitted without it, [num_prompts]."""
    rng, part = np.random.default_rng(settings.seed), np.empty(len(labels), int)
    for kind in (1, 0):
        members = rng.permutation(np.flatnonzero(labels == kind))
        if len(members) < settings.folds:
            raise RouteError(f"{len(members)} prompts of a kind are too few for {settings.folds} folds")
        part[members] = np.arange(len(members)) % settings.folds
    scores = np.empty(len(labels))
    for fold in range(settings.folds):
        fitted = part != fold
        weights, bias = logistic_regression(features[fitted], labels[fitted], settings.penalty)
        scores[~fitted] = features[~fitted] @ weights + bias
    return scores


def logistic_regression(features: Floats, labels: Floats, penalty: float) -> tuple[Floats, float]:
    """Weights [num_features] and bias that minimise mean log loss + penalty * num_features / 2 * |weights * deviation|^2.

    The weights are a sum over prompts, of which there are fewer than features: Newton's method finds its coefficients.

    Args:
        features: [num_prompts, num_features].
        labels: [num_prompts], 0 or 1.
        penalty: see above; `deviation` is each feature's standard deviation.

    """
    deviation = features.std(0)
    scale = np.where(deviation > 1e-9, 1 / np.maximum(deviation, 1e-9), 0.0)
    standard = (features - features.mean(0)) * scale
    count, width = features.shape
    kernel = standard @ standard.T * (1.0 / (width * penalty * count))
    coefficients, bias = np.zeros(count), 0.0
    ones = np.ones((count, 1))
    for _ in range(100):
        margin = kernel @ coefficients + bias
        share = 1 / (1 + np.exp(-np.clip(margin, -40, 40)))
        curvature = np.maximum(share * (1 - share), 1e-10)
        # Where the next margins m = kernel c + b meet c = labels - share - curvature (m - margin).
        system = np.block([[kernel + np.diag(1 / curvature), ones], [ones.T, np.zeros((1, 1))]])
        found = np.linalg.solve(system, np.append(margin + (labels - share) / curvature, 0.0))
        change = np.abs(found[:-1] - coefficients).max()
        coefficients, bias = found[:-1], float(found[-1])
        if change < 1e-10:
            break
    weights = standard.T @ coefficients * scale * (1.0 / (width * penalty * count))
    return weights, bias - float(features.mean(0) @ weights)
