"""All numbers of a report as one JSON value; figures and page show nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..study.controls import controls_by_attack
from ..study.records import Controls, Fsour, Rosais
from .answers import completions
from .costs import costs, machine
from .gallery import gallery
from .layers import rosais
from .prompts import by_prompt, prompt_sets
from .rates import attack_rates, differences, matrices, name_of, tries, utility
from .runs import Run
from .searches import curves, experts, routes

VERSION = "route-report/1"


def collect(runs: Sequence[Run], *, title: str | None = None, keep_completions: bool = False) -> dict[str, Any]:
    """The report's numbers.

    Args:
        runs: of one model, see `load_runs`.
        title: None: names the model.
        keep_completions: show completions whatever the verdict on them.

    Raises:
        RouteError: two results for one prompt and seed of an attack.

    """
    settings = runs[0].settings
    model = str(settings.get("model", "unknown"))
    scored = rosais(runs)
    found = tries(runs)
    return {
        "version": VERSION,
        "title": title or f"Routing safety of {PurePath(model).name or model}",
        "model": {
            "name": model,
            "fingerprint": settings["fingerprint"],
            "identity": settings.get("model_identity"),
        },
        "runs": [_run(run) for run in runs],
        "prompt_sets": prompt_sets(runs),
        "rosais": scored,
        "asr": attack_rates(found),
        "differences": differences(found),
        "by_prompt": by_prompt(runs),
        "matrix": matrices(runs),
        "utility": utility(runs),
        "curves": curves(runs),
        "routes": routes(runs, _layers(runs)),
        "experts": experts(runs),
        "gallery": gallery(runs, keep_completions),
        "costs": costs(runs),
        "completions": completions(runs, keep_completions),
        **({"controls": controlled} if (controlled := _controls(runs)) else {}),
    }


def _controls(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What is route and what is rescaling, by run."""
    entries = []
    for run in runs:
        records = run.records(Controls)
        weights = {record.attack: record.weights for record in records}
        entries += [
            {"run": run.name, "attack": name_of(attack), "weights": weights[attack], **found}
            for attack, found in controls_by_attack(records).items()
        ]
    return entries


def _run(run: Run) -> dict[str, Any]:
    done, total = run.progress()
    return {
        "name": run.name,
        "command": run.settings.get("command"),
        "data": run.settings.get("data"),
        "prompts": run.settings.get("num_prompts"),
        "prompts_digest": run.settings.get("prompts"),
        "seeds": run.seeds,
        "policy": run.policy,
        "judge": run.settings.get("judge") if run.judged else None,
        "judges": run.settings.get("judges", []) if run.judged else [],
        **machine(run),
        "dtype": run.settings.get("dtype"),
        "finished": run.finished,
        "results": done,
        "results_expected": total,
        "started": run.started,
        "last_record": run.last_record,
        "unknown_records": dict(run.unknown),
        "settings": _flat(run.settings),
    }


def _flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{where}{name}.")
        else:
            found[where + name] = value
    return found


def _layers(runs: Sequence[Run]) -> list[int]:
    """Every layer that any run speaks of."""
    layers: set[int] = set()
    for run in runs:
        layers |= set(map(int, run.settings.get("ranking", ())))
        layers |= {layer for record in run.records(Rosais) for layer in record.scores}
        layers |= {route.layer for record in run.records(Fsour) for route in record.final.routes}
    return sorted(layers)
