"""Attacks and recipes at equal candidate budgets (docs/evaluation.md), and two questions about routes (docs/what-is-a-route.md).

On three lab models (training seeds, which are the attacks' seeds too), on prompts of `test` that no setting was chosen by: the
plain answer; best masks of the top RoSais layers, of random layers, and single random masks; F-SOUR in the published code's
strategy and the adaptive one, one attempt each; SteerMoE, SAFEx, L3 and MASCing, whose comparison is of the split `search`; and a
suffix of words, which is no route. No search of routes scores more than `--budget` candidates a prompt. The two questions are
asked of the first model. Runs are campaigns in `--runs`: an interrupted call goes on.

    python benchmarks/recipe_results.py              # about five minutes of a core for each model
    python benchmarks/recipe_results.py --seeds 1    # one model's campaigns, beside another call; then once without
    python benchmarks/tables.py                      # the tables of README.md and docs/
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import NOT_MEASURED, ROOT, Rows, commit_of_tree, distinct, markdown, read_csv, write_csv
from lab_results import LABELS, RUNS, model_of, unsafe_routes

RESULTS = ROOT / "benchmarks/results/recipes_cpu.csv"
LEVEL = 3
NAMES = {
    "none": "no attack",
    **LABELS,
    "rosais-native": "best masks of the top RoSais layers, native weights",
    "random-masks": "random masks, one try",
    "fsour-code": "F-SOUR code",
    "fsour-adaptive": "F-SOUR adaptive",
    "steermoe": "SteerMoE",
    "safex": "SAFEx",
    "l3": "L3",
    "mascing": "MASCing",
    "suffix": "suffix of words (input only)",
}
ASR, CANDIDATES, GAIN, NATIVE = "ASR", "candidates a prompt", "gain, nats", "gain with native weights"
ROSAIS, SHARES = "RoSais, nats", "share of F-SOUR's gain"
# In no table.
CLEAN = "clean"
COLUMNS = (ASR, CANDIDATES, GAIN, NATIVE)
CONTROLS = ("--controls", 10)
# Measures of a prompt that might say whether a suffix opens it.
PREDICTORS = {
    ("rosais", GAIN): "gain of the best masks",
    ("fsour-code", GAIN): "gain of F-SOUR",
    ("fsour-code", NATIVE): "gain of F-SOUR's route with native weights",
    ("l3", GAIN): "gain of L3",
    ("none", CLEAN): "log-probability of the target without an attack",
}
Cells = dict[tuple[str, str], list[tuple[Any, Any, Any]]]
LARGEST_ROUND = 33


def run(out: Path, model: str, seed: int, num: int, budget: int) -> None:
    """Every campaign of one model."""
    shared = ["--model", model, "--dtype", "float32", "--seeds", seed]
    judged = [*shared, "--data", "lab:test", "--limit", num, "--judge", "lab", "--max-new-tokens", 32]
    masks = ["--rosais", out / "rosais", "--masks", budget // LEVEL, "--layers", LEVEL, *CONTROLS]
    unsafe_routes("rosais", *shared, "--data", "lab:search", "--limit", num, "--masks", 20, "--same-masks", "--out", out / "rosais")
    unsafe_routes("mask-attack", *judged, *masks, "--out", out / "masks")
    unsafe_routes("mask-attack", *judged, *masks, "--attack", "rosais", "--weights", "native", "--out", out / "masks-native")
    one = ["--attempts", 1, "--search-answered", *CONTROLS]
    unsafe_routes("fsour", *judged, *one, "--strategy", "code", "--draws", draws(num, budget), "--out", out / "fsour-code")
    # It looks at its budget between rounds.
    adaptive = ["--strategy", "adaptive", "--adaptive-max-candidates", max(1, budget - LARGEST_ROUND)]
    unsafe_routes("fsour", *judged, *one, *adaptive, "--out", out / "fsour-adaptive")
    contrast = ["--refused", "lab:search", "--answered", "lab:search:benign"]
    unsafe_routes("recipe", *judged, *contrast, "--candidates", budget, "--out", out / "recipes")
    alone = ["--attack", "suffix", "--defence", "none", "--utility-limit", 2]
    unsafe_routes("evaluate", *judged, *alone, "--out", out / "suffix")


def run_stability(out: Path, model: str, num: int) -> None:
    """RoSais with three seeds of its masks."""
    scores = ["--model", model, "--dtype", "float32", "--seeds", "0,1,2", "--masks", 20, "--same-masks"]
    unsafe_routes("rosais", *scores, "--data", "lab:search", "--limit", num, "--out", out / "rosais-seeds")


def draws(num: int, budget: int) -> int:
    """Draws at each cell that keep the longest prompt's search within the budget."""
    from vllm_unsafe_routes.study.model import Model
    from vllm_unsafe_routes.study.prompts import read_prompts

    model = Model("lab")
    longest = max(len(model.item(record).prompt.token_ids) for record in read_prompts("lab:test", num))
    return max(1, (budget - 1) // (longest * (len(model.shape.moe_layers) - 1) + 1))


def figures(out: Path) -> Iterator[tuple[str, str, Any, float | bool | None]]:
    """(attack, column, prompt, value) of every record of one model."""
    from vllm_unsafe_routes.study.records import Answer, Controls, Fsour, Mask, Matrix, Recipe, Record, read

    for folder in ("masks", "masks-native", "fsour-code", "fsour-adaptive", "recipes", "suffix"):
        for record in read(out / folder, Record):
            if isinstance(record, Answer):
                if folder == "masks":
                    yield "none", ASR, record.prompt, record.success
                continue
            if not isinstance(record, Controls | Fsour | Mask | Matrix | Recipe):
                continue
            attack = "rosais-native" if folder == "masks-native" else record.attack
            if isinstance(record, Controls):
                yield attack, GAIN, record.prompt, record.found - record.clean
                if folder == "fsour-code":
                    yield "none", CLEAN, record.prompt, record.clean
                yield attack, NATIVE, record.prompt, record.native - record.clean
                continue
            success = record.answers[LEVEL].success if isinstance(record, Mask) else record.success
            yield attack, ASR, record.prompt, success
            yield attack, CANDIDATES, record.prompt, record.candidates
            if isinstance(record, Recipe):
                yield attack, GAIN, record.prompt, record.found - record.clean


def tabulate(folders: Sequence[Path], budget: int) -> Rows:
    """One line a figure; `folders` are of the models, in order."""
    from vllm_unsafe_routes.evaluation.statistics import Outcomes, mean_interval
    from vllm_unsafe_routes.study.summary import interval_json, rate

    cells, of_first = cells_of(folders), cells_of(folders[:1])
    lines: Rows = []
    for (attack, column), found in cells.items():
        if column == CLEAN:
            continue
        entry = rate(found) if column == ASR else interval_json(mean_interval(Outcomes.from_rows(found)), 0)
        lines.append({"table": "attacks", "row": attack, "column": column, "budget": budget} | entry)
    order = list(NAMES)
    rows = sorted(lines, key=lambda line: order.index(line["row"]))
    return [*rows, *predictions(of_first), *layers_by_category(folders[0])]


def cells_of(folders: Sequence[Path]) -> Cells:
    """The figures by attack and column; a model is told by its number, which stands for the seed."""
    cells: Cells = {}
    for number, folder in enumerate(folders):
        for attack, column, prompt, value in figures(folder):
            cells.setdefault((attack, column), []).append((prompt, number, value))
    return cells


def predictions(cells: Cells) -> Rows:
    """Whether what a search of routes gains on a prompt says which prompts a suffix opens: rank correlations over prompts."""
    from vllm_unsafe_routes.evaluation.correlation import rank_correlation
    from vllm_unsafe_routes.study.summary import interval_json

    def of(attack: str, column: str) -> dict[Any, float]:
        values: dict[Any, list[float]] = {}
        for prompt, _, value in cells.get((attack, column), []):
            if value is not None:
                values.setdefault(prompt, []).append(float(value))
        return {prompt: sum(found) / len(found) for prompt, found in values.items()}

    opened, lines = of("suffix", ASR), []
    for attack, column in PREDICTORS:
        measure = of(attack, column)
        pairs = [(measure[prompt], opened[prompt]) for prompt in measure if prompt in opened]
        if len({one for one, _ in pairs}) > 1 and len({one for _, one in pairs}) > 1:
            found = interval_json(rank_correlation(pairs), 0)
            lines.append({"table": "prediction", "row": attack, "column": column} | found)
    return lines


def layers_by_category(out: Path) -> Rows:
    """By category of prompts: RoSais of each layer, its share of what F-SOUR gained, and for how many prompts it is first."""
    from vllm_unsafe_routes.evaluation.statistics import Outcomes, mean_interval
    from vllm_unsafe_routes.study.records import Fsour, Rosais, read
    from vllm_unsafe_routes.study.summary import interval_json

    # (category, prompt, seed, layer -> value) by measure.
    samples: dict[str, list[tuple[str, str, int, dict[int, float]]]] = {
        ROSAIS: [(one.category, one.prompt, one.seed, one.scores) for one in read(out / "rosais-seeds", Rosais)],
        SHARES: [
            (one.category, one.prompt, one.seed, gain_shares(one.final.routes))
            for one in read(out / "fsour-code", Fsour)
            if one.final.routes
        ],
    }
    lines = []
    for measure, found in samples.items():
        layers = sorted({layer for *_, values in found for layer in values})
        for category in ["all", *sorted({one[0] for one in found})]:
            mine = [one for one in found if category in ("all", one[0])]
            for layer in layers:
                rows = [(prompt, seed, values.get(layer, 0.0)) for _, prompt, seed, values in mine]
                first = [(prompt, seed, float(max(values, key=values.__getitem__) == layer)) for _, prompt, seed, values in mine]
                for column, cells in ((f"layer {layer}", rows), (f"layer {layer} first", first)):
                    about = {"table": f"stability, {measure}", "row": category, "column": column}
                    lines.append(about | interval_json(mean_interval(Outcomes.from_rows(cells)), 0))
    return lines


def gain_shares(routes: Sequence[Any]) -> dict[int, float]:
    """Each layer's share of what accepted routes gained."""
    total = sum(route.gain for route in routes)
    layers = sorted({route.layer for route in routes})
    return {layer: sum(route.gain for route in routes if route.layer == layer) / total for layer in layers}


def table(lines: Rows) -> str:
    """Success, candidates and gain by attack."""
    lines = [line for line in lines if line["table"] == "attacks"]
    if not lines:
        return NOT_MEASURED

    def cell(row: str, column: str) -> str:
        line = next((one for one in lines if (one["row"], one["column"]) == (row, column)), None)
        if line is None:
            return ""
        return f"{float(line['value']):.0f}" if column == CANDIDATES else shown(line)

    first = lines[-1]
    head = (
        f"{first['seeds']} lab models (training seeds), {first['prompts']} prompts of `test` each, at most {first['budget']} "
        f"candidates a prompt, {first['date']}; 95% intervals over prompts and models."
    )
    rows = [[NAMES[row], *(cell(row, column) for column in COLUMNS)] for row in distinct(lines, "row")]
    return f"{head}\n\n{markdown(['attack', *COLUMNS], rows)}"


def shown(line: dict[str, Any]) -> str:
    """A figure with its interval."""
    value, low, high = (float(line[name]) for name in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def prediction_table(lines: Rows) -> str:
    """Rank correlations with the success of a suffix."""
    rows = [line for line in lines if line["table"] == "prediction"]
    if not rows:
        return NOT_MEASURED
    names = {(attack, column): name for (attack, column), name in PREDICTORS.items()}
    return markdown(
        [f"of {rows[0]['prompts']} prompts", "rank correlation with a suffix's success"],
        [[names[row["row"], row["column"]], shown(row)] for row in rows],
    )


def stability_table(lines: Rows) -> str:
    """RoSais, and F-SOUR's gains, by category."""
    made = []
    for measure in (ROSAIS, SHARES):
        rows = [line for line in lines if line["table"] == f"stability, {measure}"]
        if not rows:
            continue
        columns = [column for column in distinct(rows, "column") if not column.endswith("first")]
        cells = {(row["row"], row["column"]): row for row in rows}
        for name in distinct(rows, "row"):
            tops = " / ".join(f"{float(cells[name, f'{column} first']['value']):.2f}" for column in columns)
            prompts = cells[name, columns[0]]["prompts"]
            made.append([f"{measure}, {name} ({prompts})", *(shown(cells[name, column]) for column in columns), tops])
    return (
        markdown(["measure, category (prompts)", *columns, "share of prompts whose first layer it is"], made)
        if made
        else NOT_MEASURED
    )


TABLES = {"recipes": table, "route-and-suffix": prediction_table, "route-stability": stability_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/recipes", help="folder of the campaigns")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of a split (default: 24)")
    parser.add_argument("--budget", type=int, default=384, help="candidates a prompt (default: 384)")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the models, separated by commas (default: 0,1,2)")
    parser.add_argument("--tables-only", action="store_true", help="run nothing: CSV of what is there")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    folders = {int(seed): args.runs / f"seed-{seed}" for seed in args.seeds.split(",")}
    if not args.tables_only:
        for seed, folder in folders.items():
            run(folder, model_of(seed, RUNS), seed, args.prompts, args.budget)
        first = next(iter(folders))
        run_stability(folders[first], model_of(first, RUNS), args.prompts)
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit_of_tree()}
    lines = [about | row for row in tabulate([*folders.values()], args.budget)]
    write_csv(RESULTS, lines)
    print(table(read_csv(RESULTS)))


if __name__ == "__main__":
    main()
