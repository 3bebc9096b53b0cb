"""One table of attacks and recipes at equal candidate budgets: docs/evaluation.md.

On the lab model that ships, on prompts of `test` that no setting was chosen by: the plain answer; best masks of the top RoSais
layers, of random layers, and single random masks; F-SOUR in the published code's strategy and the adaptive one, one attempt each;
SteerMoE, SAFEx, L3 and MASCing, whose comparison is of the split `search`. None scores more than `--budget` candidates a prompt.
Runs are campaigns in `--runs`: an interrupted call goes on.

    python benchmarks/recipe_results.py              # about ten minutes of two idle cores
    python benchmarks/tables.py                      # the tables of README.md and docs/
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import NOT_MEASURED, ROOT, Rows, commit_of_tree, distinct, markdown, read_csv, write_csv
from lab_results import LABELS, unsafe_routes

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
}
ASR, CANDIDATES, GAIN, NATIVE = "ASR", "candidates a prompt", "gain, nats", "gain with native weights"
COLUMNS = (ASR, CANDIDATES, GAIN, NATIVE)
CONTROLS = ("--controls", 10)
LARGEST_ROUND = 33


def run(out: Path, num: int, budget: int, seeds: str) -> None:
    """Every campaign."""
    shared = ["--model", "lab", "--dtype", "float32", "--seeds", seeds]
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


def draws(num: int, budget: int) -> int:
    """Draws at each cell that keep the longest prompt's search within the budget."""
    from vllm_unsafe_routes.study.model import Model
    from vllm_unsafe_routes.study.prompts import read_prompts

    model = Model("lab")
    longest = max(len(model.item(record).prompt.token_ids) for record in read_prompts("lab:test", num))
    return max(1, (budget - 1) // (longest * (len(model.shape.moe_layers) - 1) + 1))


def figures(out: Path) -> Iterator[tuple[str, str, Any, Any, float | bool | None]]:
    """(attack, column, prompt, seed, value) of every record."""
    from vllm_unsafe_routes.study.records import Answer, Controls, Fsour, Mask, Recipe, Record, read

    for folder in ("masks", "masks-native", "fsour-code", "fsour-adaptive", "recipes"):
        for record in read(out / folder, Record):
            if isinstance(record, Answer):
                if folder == "masks":
                    yield "none", ASR, record.prompt, 0, record.success
                continue
            if not isinstance(record, Controls | Fsour | Mask | Recipe):
                continue
            attack = "rosais-native" if folder == "masks-native" else record.attack
            if isinstance(record, Controls):
                yield attack, GAIN, record.prompt, record.seed, record.found - record.clean
                yield attack, NATIVE, record.prompt, record.seed, record.native - record.clean
                continue
            success = record.answers[LEVEL].success if isinstance(record, Mask) else record.success
            yield attack, ASR, record.prompt, record.seed, success
            yield attack, CANDIDATES, record.prompt, record.seed, record.candidates
            if isinstance(record, Recipe):
                yield attack, GAIN, record.prompt, record.seed, record.found - record.clean


def tabulate(out: Path, budget: int) -> Rows:
    """One line a figure."""
    from vllm_unsafe_routes.evaluation.statistics import Outcomes, mean_interval
    from vllm_unsafe_routes.study.summary import interval_json, rate

    cells: dict[tuple[str, str], list[tuple[Any, Any, Any]]] = {}
    for attack, column, prompt, seed, value in figures(out):
        cells.setdefault((attack, column), []).append((prompt, seed, value))
    lines: Rows = []
    for (attack, column), found in cells.items():
        entry = rate(found) if column == ASR else interval_json(mean_interval(Outcomes.from_rows(found)), 0)
        lines.append({"row": attack, "column": column, "budget": budget} | entry)
    order = list(NAMES)
    return sorted(lines, key=lambda line: order.index(line["row"]))


def table(lines: Rows) -> str:
    """Success, candidates and gain by attack."""
    if not lines:
        return NOT_MEASURED

    def cell(row: str, column: str) -> str:
        line = next((one for one in lines if (one["row"], one["column"]) == (row, column)), None)
        if line is None:
            return ""
        value, low, high = (float(line[name]) for name in ("value", "low", "high"))
        return f"{value:.0f}" if column == CANDIDATES else f"{value:.2f} [{low:.2f}, {high:.2f}]"

    first = lines[-1]
    head = (
        f"The shipped lab model, {first['prompts']} prompts of `test`, {first['seeds']} seed(s), at most {first['budget']} "
        f"candidates a prompt, {first['date']}; 95% intervals over prompts and seeds."
    )
    rows = [[NAMES[row], *(cell(row, column) for column in COLUMNS)] for row in distinct(lines, "row")]
    return f"{head}\n\n{markdown(['attack', *COLUMNS], rows)}"


TABLES = {"recipes": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/recipes", help="folder of the campaigns")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of a split (default: 24)")
    parser.add_argument("--budget", type=int, default=384, help="candidates a prompt (default: 384)")
    parser.add_argument("--seeds", default="0", help="seeds of the attacks, separated by commas (default: 0)")
    parser.add_argument("--tables-only", action="store_true", help="run nothing: CSV of what is there")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if not args.tables_only:
        run(args.runs, args.prompts, args.budget, args.seeds)
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit_of_tree()}
    lines = [about | row for row in tabulate(args.runs, args.budget)]
    write_csv(RESULTS, lines)
    print(table(read_csv(RESULTS)))


if __name__ == "__main__":
    main()
