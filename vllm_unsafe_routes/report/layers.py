"""RoSais by layer, by prompt and by category of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..evaluation.statistics import Interval, Outcomes, mean_interval
from ..study.records import Rosais
from ..study.summary import DIGITS, interval_json, layer_scores
from .rates import label_runs
from .runs import Run, category_of

# By category there are many intervals, each over few prompts.
CATEGORY_RESAMPLES = 2_000


def rosais(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """One entry for each run that scored layers."""
    found = [run for run in runs if run.records(Rosais)]
    labels = label_runs([(_variant(run), run) for run in found])
    return [{"run": run.name, "label": label, **_scores(run)} for run, label in zip(found, labels, strict=True)]


def _variant(run: Run) -> str:
    score = "next-token score" if run.settings.get("score", "next") == "next" else "target score"
    later = "later layers free" if run.settings.get("later_layers", "free") == "free" else "later layers kept"
    return f"{score}, {later}"


def _scores(run: Run) -> dict[str, Any]:
    records = run.records(Rosais)
    found = layer_scores(records)
    layers = sorted(found.rows)
    category = {record.prompt: category_of(record) for record in records}
    prompts = sorted(category, key=lambda prompt: (category[prompt], _natural(prompt)))
    table = np.array([[_mean_of(found.rows[layer], prompt) for layer in layers] for prompt in prompts])
    return {
        "masks": run.settings.get("num_masks"),
        "num_prompts": len(prompts),
        "seeds": sorted({record.seed for record in records}),
        "layers": [
            {
                "layer": layer,
                **_figures(found.means[layer]),
                "dataset": round(found.dataset[layer], DIGITS) if layer in found.dataset else None,
                "rank": found.ranking.index(layer) + 1,
            }
            for layer in layers
        ],
        "ranking": list(found.ranking),
        "prompts": [
            {"prompt": prompt, "category": category[prompt], "scores": [round(float(score), DIGITS) for score in scores]}
            for prompt, scores in zip(prompts, table, strict=True)
        ],
        "categories": _categories(found.rows, layers, category, table, prompts),
    }


def _natural(name: str) -> tuple[str, int]:
    """Sorts forbidden-2 before forbidden-10."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)


def _mean_of(rows: Sequence[tuple[Any, Any, float]], prompt: Any) -> float:
    return float(np.mean([score for other, _, score in rows if other == prompt]))


def _figures(interval: Interval) -> dict[str, Any]:
    """An interval as JSON values. Scores have no errors: what is missing has not been computed yet."""
    figures = interval_json(interval, 0)
    del figures["errors"]
    return figures


def _categories(
    rows: Mapping[int, Sequence[tuple[Any, Any, float]]],
    layers: Sequence[int],
    category: Mapping[Any, str],
    table: npt.NDArray[np.float64],
    prompts: Sequence[Any],
) -> list[dict[str, Any]]:
    """Mean by layer of each category, and how well its order of layers agrees with that of all other prompts."""
    names = sorted(set(category.values()))
    if len(names) < 2:
        return []
    entries = []
    for name in names:
        inside = np.array([category[prompt] == name for prompt in prompts])
        means = [
            mean_interval(Outcomes.from_rows(row for row in rows[layer] if category[row[0]] == name), resamples=CATEGORY_RESAMPLES)
            for layer in layers
        ]
        entries.append(
            {
                "category": name,
                "num_prompts": int(inside.sum()),
                "layers": [{"layer": layer, **_figures(interval)} for layer, interval in zip(layers, means, strict=True)],
                "top_layer": layers[int(np.argmax(table[inside].mean(axis=0)))],
                "rank_agreement": _spearman(table[inside].mean(axis=0), table[~inside].mean(axis=0)),
            }
        )
    return entries


def _spearman(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float | None:
    """Rank correlation, ties sharing their mean rank; None where one of the two has no order."""
    ranks: list[npt.NDArray[np.float64]] = []
    for values in (first, second):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[inverse])
    if any(np.ptp(rank) == 0 for rank in ranks):
        return None
    return round(float(np.corrcoef(ranks[0], ranks[1])[0, 1]), DIGITS)
