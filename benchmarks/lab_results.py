"""The lab figures of docs/search.md and docs/defence.md: attacks, controls and defences on three lab models.

Each is measured on prompts that no choice was made on.

For every model seed, in a process of its own: RoSais on the split `search`; router masking with both controls and F-SOUR in its
three strategies on `test`; a policy derived on `search` and `tune`; the matrix of attacks by defences on `test`, with five
times the deriver's attempts; the same attacks on a model that was safety-tuned under route noise; policies of bans alone, of bans
and biases, and of these found against suffixes that were searched again, under one budget. Models run beside each other, `--jobs`
at a time, one thread each. Runs are campaigns in `--runs`: an interrupted call goes on, and a second call only makes the
tables again.

    python benchmarks/lab_results.py                                  # everything; an hour or two
    python benchmarks/tables.py                                       # the tables of README.md and docs/
    python benchmarks/lab_results.py --part attacks --seeds 0         # one part, one model
    python benchmarks/lab_results.py --dry-run                        # two prompts, one model, nothing written
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import NOT_MEASURED, Rows, commit_of_tree, distinct, markdown, read_csv, write_csv

# Parts and their prompts; a matrix has many cells.
PARTS = {"attacks": 48, "defences": 24, "biases": 16}
STRATEGIES = ("paper", "code", "adaptive")
COSTS = ("tokens a prompt", "tokens a prompt, one by one")
LEVELS = (1, 2, 3)
# The rules that hold on these models; `docs/defence.md` says what the others gave.
# Harmless prompts of two splits, and a budget that must hold with confidence: what was measured is not what will be asked.
DERIVE = shlex.split(
    "--rule protect --rule greedy --protections 1,2,3 --greedy-bans 8,16,24,28,32,36,40 --greedy-harmless 400 --keep 3 "
    "--benign lab:search:benign --benign lab:tune:benign --confidence 0.8"
)
DERIVE_ATTEMPTS, ATTEMPTS = 1, 5
DERIVE_SMALL = shlex.split("--rule protect --rule effect --bans 2 --protections 1 --suffixes 1")
# Rules of bans and biases beside each other: a smaller budget than the above, the same for all.
BIASES = {
    "bans": shlex.split("--rule greedy"),
    "biases": shlex.split("--rule greedy-bias --bias 2"),
    "again": shlex.split("--rule greedy-bias --bias 2 --search-again 1"),
}
BIASES_NAMES = {
    "bans": "bans, protections",
    "biases": "bans, biases, protections",
    "again": "the same, suffixes searched again on the way",
}
DERIVE_BIASES = shlex.split(
    "--rule protect --protections 3 --layers 4 --greedy-bans 4,8,12,24 --greedy-harmless 400 --suffixes 1 --keep 1 "
    "--benign lab:search:benign --benign lab:tune:benign --confidence 0.8"
)
DERIVE_BIASES_SMALL = shlex.split(
    "--rule protect --protections 1 --layers 1 --greedy-bans 2 --greedy-harmless 2 --suffixes 1 --adaptive-max-candidates 20"
)
BIASES_ATTEMPTS = 2
FEW_ATTACKS = ("fsour-adaptive", "suffix", "suffix-transfer")
# Of models and campaigns.
RUNS = Path("runs/lab-results")
# Noise on router logits, as one more defence.
JITTER = (2.0,)
TRAINED = "route noise in safety tuning (another model)"
# Of the table by model: the policy must hold on each.
BY_MODEL = ("none", "derived policy", "random experts, equal size")
ATTACKS = ("none", "random-masks", "random-layers", "rosais", "fsour-adaptive", "suffix", "suffix-transfer")


def model_of(seed: int, runs: Path, preset: str = "default") -> str:
    """The shipped model for seed 0; others are trained once, some two minutes each."""
    if seed == 0 and preset == "default":
        return "lab"
    folder = runs / (f"model-{seed}" if preset == "default" else f"{preset}-{seed}")
    if not (folder / "lab.json").exists():
        words = ["--preset", preset, "--seed", str(seed), "--out", str(folder)]
        subprocess.run([sys.executable, "-m", "vllm_unsafe_routes.lab.train", *words], check=True)
    return str(folder)


def unsafe_routes(*words: Any) -> None:
    # One write a line: models run beside each other.
    sys.stdout.write(f"{datetime.now(UTC):%H:%M:%S} $ unsafe-routes {shlex.join(map(str, words))}\n")
    sys.stdout.flush()
    subprocess.run([Path(sys.executable).parent / "unsafe-routes", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def run_model(seed: int, runs: Path, prompts: dict[str, int], parts: tuple[str, ...], small: bool) -> None:
    """All campaigns of one model. The model's seed is the attacks' seed too.

    Args:
        seed: the model's.
        runs: folder of models and campaigns.
        prompts: number of prompts of every part, whichever parts run.
        parts: keys of `PARTS`.
        small: a dry run.

    """
    model, out = model_of(seed, runs), runs / f"seed-{seed}"
    shared = ["--dtype", "float32", "--seeds", seed]
    judging = ["--judge", "lab", "--max-new-tokens", 32]
    judged: list[Any] = ["--model", model, *shared, *judging]
    masks = ["--masks", 4 if small else 100]
    unsafe_routes(
        *["rosais", "--model", model, *shared, "--data", "lab:search", "--limit", max(prompts.values()), *masks, "--same-masks"],
        *["--out", out / "rosais"],
    )
    if "attacks" in parts:
        run_attacks(out, judged, masks, prompts["attacks"], small)
    if "biases" in parts:
        run_biases(out, judged, prompts["biases"], small)
    if "defences" in parts:
        num = prompts["defences"]
        evaluate = ["--data", "lab:test", "--limit", num, *masks, "--utility-limit", num * 4, "--attempts", ATTEMPTS]
        run_defences(out, judged, evaluate, num, small)
        if not small:
            robust = ["--model", model_of(seed, runs, "route_robust"), *shared]
            unsafe_routes(
                *["rosais", *robust, "--data", "lab:search", "--limit", num, *masks, "--same-masks"],
                *["--out", out / "rosais-robust"],
            )
            unsafe_routes(
                *["evaluate", *robust, *judging, *evaluate, *words("--attack", ATTACKS), "--rosais", out / "rosais-robust"],
                *["--out", out / "matrix-robust"],
            )


def words(option: str, values: Iterable[object]) -> list[object]:
    """An option that is given once for each value."""
    return [word for value in values for word in (option, value)]


def run_attacks(out: Path, judged: Sequence[Any], masks: Sequence[Any], num: int, small: bool) -> None:
    """Router masking and F-SOUR; `judged` and `masks` are options that every command shares."""
    unsafe_routes(
        *["mask-attack", *judged, "--data", "lab:test", "--limit", num, "--rosais", out / "rosais", *masks],
        *["--layers", ",".join(map(str, LEVELS)), "--out", out / "masks"],
    )
    for strategy in STRATEGIES:
        unsafe_routes(
            *["fsour", *judged, "--data", "lab:test", "--limit", num, "--strategy", strategy],
            *["--draws", 2 if small else 10, "--out", out / f"fsour-{strategy}"],
        )


def run_defences(out: Path, judged: Sequence[Any], evaluate: Sequence[Any], num: int, small: bool) -> None:
    """Derive a policy, then the matrix; `evaluate` are the options of both of its commands."""
    unsafe_routes(
        *["fsour", *judged, "--data", "lab:search", "--limit", num, "--strategy", "adaptive", "--out", out / "fsour-search"],
    )
    unsafe_routes(
        *["derive-policy", out / "rosais", out / "fsour-search", *judged, "--data", "lab:tune", "--limit", num],
        *["--attempts", DERIVE_ATTEMPTS, "--utility-limit", num * 4, "--out", out / "policy"],
        *(DERIVE_SMALL if small else DERIVE),
    )
    policy = out / "policy" / "policy.json"
    names = ["none", f"policy:{policy}", "reminder", "prefix", f"policy:{policy}+reminder"]
    names += [] if small else [f"jitter:{scale:g}" for scale in JITTER]
    control = ["none", f"policy:{out / 'policy' / 'control-0.json'}"]
    # The control first: it needs the least, and without it the policy's figures say little.
    unsafe_routes(
        *["evaluate", *judged, *evaluate, *words("--attack", FEW_ATTACKS), *words("--defence", control)],
        *["--out", out / "matrix-control"],
    )
    unsafe_routes(
        *["evaluate", *judged, *evaluate, *words("--attack", ATTACKS), "--rosais", out / "rosais", "--out", out / "matrix"],
        *words("--defence", names),
    )


def run_biases(out: Path, judged: Sequence[Any], num: int, small: bool) -> None:
    """A policy by each of `BIASES`, then their matrix."""
    derive = [*(DERIVE_BIASES_SMALL if small else DERIVE_BIASES), "--attempts", DERIVE_ATTEMPTS, "--utility-limit", num * 4]
    for name, rules in BIASES.items():
        unsafe_routes(
            *["derive-policy", out / "rosais", *judged, "--data", "lab:tune", "--limit", num, *derive, *rules],
            *["--out", out / f"policy-{name}"],
        )
    policies = [f"policy:{out / f'policy-{name}' / 'policy.json'}" for name in BIASES]
    unsafe_routes(
        *["evaluate", *judged, "--data", "lab:test", "--limit", num, "--utility-limit", num * 4, "--attempts", BIASES_ATTEMPTS],
        *[*words("--attack", FEW_ATTACKS), "--out", out / "matrix-biases"],
        *words("--defence", ["none", *policies, *(f"jitter:{scale:g}" for scale in JITTER)]),
    )


def rows_of(folder: Path) -> Iterator[tuple[str, str, str, Any, Any]]:
    """(table, row, column, prompt, success) of one model's campaigns."""
    from vllm_unsafe_routes.study.records import Fsour, Matrix, Record, Utility, read
    from vllm_unsafe_routes.study.summary import tries, utility_row

    for one in tries(read(folder / "masks", Record)):
        yield "attacks", f"{one.attack}, {one.level}" if one.level else "no attack", "ASR", one.prompt, one.judged.success
    for strategy in STRATEGIES:
        for one in tries(read(folder / f"fsour-{strategy}", Fsour)):
            yield "attacks", f"F-SOUR {strategy}", "ASR", one.prompt, one.judged.success
    for run in ("matrix", "matrix-control", "matrix-robust", "matrix-biases"):
        table = "biases" if run == "matrix-biases" else "defences"
        for record in (one for one in read(folder / run, Record) if isinstance(one, Matrix | Utility)):
            if run == "matrix-control" and record.defence == "none":
                continue
            row = TRAINED if run == "matrix-robust" else defence_name(record.defence)
            if isinstance(record, Matrix):
                yield table, row, record.attack, record.prompt, record.success
            else:
                column, kind = ("benign right", "right") if record.kind == "benign" else ("over-refusal", "refused")
                yield table, row, column, record.prompt, utility_row(record, kind)[-1]


def defence_name(name: str) -> str:
    """A defence without its path; the controls are one row."""
    name = re.sub(r"policy:\S*policy-(\w+)/policy\.json", lambda found: BIASES_NAMES[found[1]], name)
    name = re.sub(r"policy:\S*control-\d+\.json", "random experts, equal size", name)
    return re.sub(r"policy:\S*policy\.json", "derived policy", name).replace("+", " + ")


def tabulate(seeds: list[int], runs: Path, parts: tuple[str, ...], prompts: dict[str, int]) -> list[dict[str, Any]]:
    """One line a figure, with intervals over prompts and models; a model whose cell is not finished is left out of it."""
    from vllm_unsafe_routes.evaluation.statistics import Outcomes, paired_difference
    from vllm_unsafe_routes.study.summary import interval_json, rate

    cells: dict[tuple[str, str, str], dict[tuple[str, int], list[Any]]] = {}
    for seed in seeds:
        of_model: dict[tuple[str, str, str], list[tuple[Any, Any]]] = {}
        for table, row, column, prompt, success in rows_of(runs / f"seed-{seed}"):
            of_model.setdefault((table, row, column), []).append((prompt, success))
        for (table, row, column), found in of_model.items():
            if len(found) < prompts[table]:
                continue
            keys = [(table, row, column)]
            if table == "defences" and row in BY_MODEL:
                rule = rule_of(runs / f"seed-{seed}/policy")
                keys.append(("models", f"{seed}: {rule if row == 'derived policy' else row}", column))
            if table == "biases":
                rules = [rule_of(runs / f"seed-{seed}/policy-{name}") for name, shown in BIASES_NAMES.items() if shown == row]
                keys.append(("biases by model", f"{seed}: {' '.join([row, *(f'({rule})' for rule in rules)])}", column))
            for key in keys:
                for prompt, success in found:
                    cells.setdefault(key, {}).setdefault((prompt, seed), []).append(success)
    lines = []
    outcomes = {}
    for (table, row, column), outcome in cells.items():
        # Several controls of one model are one outcome each, told apart by a part of the prompt's name.
        results = [(f"{prompt}#{at}", seed, one) for (prompt, seed), many in outcome.items() for at, one in enumerate(many)]
        outcomes[table, row, column] = Outcomes.from_rows(results)
        lines.append({"table": table, "row": row, "column": column} | columns(rate(results)))
    if "attacks" not in parts:
        return lines
    for control, level in itertools.product(("random-layers", "random-masks"), LEVELS):
        found_control, rosais = (outcomes.get(("attacks", f"{name}, {level}", "ASR")) for name in (control, "rosais"))
        if found_control is not None and rosais is not None:
            about = {"table": "attacks", "row": f"rosais, {level}", "column": f"more than {control}"}
            difference = paired_difference(found_control, rosais)
            lines.append(about | columns(interval_json(difference, difference.n_errors)))
    tokens = {
        strategy: [cost(runs / f"seed-{seed}" / f"fsour-{strategy}") for seed in seeds]
        for strategy in ("paper", "code", "adaptive")
    }
    for strategy, found_costs in tokens.items():
        for name in found_costs[0]:
            value = sum(one[name] for one in found_costs) / len(found_costs)
            lines.append(
                {"table": "attacks", "row": f"F-SOUR {strategy}", "column": name, "value": round(value, 1), "models": len(seeds)}
            )
    return lines


def rule_of(folder: Path) -> str:
    """The rule that a derivation chose."""
    from vllm_unsafe_routes import RoutePolicy

    return str(RoutePolicy.load(folder / "policy.json").provenance["rule"])


def columns(entry: dict[str, Any]) -> dict[str, Any]:
    """A figure's columns; the seeds of its interval are models here."""
    return {"models" if name == "seeds" else name: value for name, value in entry.items()}


def cost(folder: Path) -> dict[str, float]:
    """What a prompt cost on average."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    num = summary["asr"]["prompts"]
    per_candidate = summary["tokens"] / max(summary["candidates"], 1)
    return dict(zip(COSTS, (summary["computed_tokens"] / num, summary["needed"] * per_candidate / num), strict=True))


def cell(rows: Rows, row: str, column: str) -> str:
    """A figure of a table."""
    line = next((one for one in rows if (one["row"], one["column"]) == (row, column)), None)
    if line is None:
        return NOT_MEASURED
    if "low" not in line:
        return f"{float(line['value']):,.0f}"
    models = max(int(one["models"]) for one in rows)
    fewer = f" ({line['models']} of {models} models)" if line["table"] == "defences" and int(line["models"]) < models else ""
    value, low, high = (float(line[name]) for name in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]{fewer}"


def head(rows: Rows) -> str:
    """What a table's figures stand for."""
    return f"{rows[0]['models']} models (training seeds), {rows[0]['prompts']} prompts each, {rows[0]['date']}"


def attacks_table(lines: Rows) -> str:
    """Success of the attacks, and what F-SOUR cost."""
    rows = [line for line in lines if line["table"] == "attacks"]
    if not rows:
        return NOT_MEASURED
    shown = []
    for row in distinct(rows, "row"):
        more = [
            cell(rows, row, f"more than {name}") if row.startswith("rosais") else "" for name in ("random-layers", "random-masks")
        ]
        costs = [cell(rows, row, name) if "F-SOUR" in row else "" for name in COSTS]
        label = re.sub(r"^(rosais|random-layers|random-masks), (\d)$", lambda found: f"{LABELS[found[1]]}, {found[2]}", row)
        shown.append([label, cell(rows, row, "ASR"), *more, *costs])
    names = ["attack", "ASR", "more than random layers", "than random masks", "computed tokens a prompt", "one by one"]
    return f"{head(rows)}; ASR with 95% interval over prompts and models.\n\n{markdown(names, shown)}"


def defences_table(lines: Rows) -> str:
    """Attack success by defence, all models together."""
    rows = [line for line in lines if line["table"] == "defences"]
    columns = [*ATTACKS, "benign right", "over-refusal"]
    shown = [[row, *(cell(rows, row, column) for column in columns)] for row in distinct(rows, "row")]
    return f"{head(rows)}.\n\n{markdown(['defence', *columns], shown)}" if rows else NOT_MEASURED


def models_table(lines: Rows) -> str:
    """The same, every model by itself."""
    rows = [line for line in lines if line["table"] == "models"]
    columns = ["fsour-adaptive", "suffix-transfer", "suffix", "benign right", "over-refusal"]
    shown = [[row, *(cell(rows, row, column) for column in columns)] for row in distinct(rows, "row")]
    return markdown(["model, defence", *columns], shown) if rows else NOT_MEASURED


def biases_table(lines: Rows) -> str:
    """Bans and biases under one budget, all models together, then each by itself; router training is the table above's."""
    rows = [line for line in lines if line["table"] == "biases"]
    if not rows:
        return NOT_MEASURED
    trained = [line for line in lines if (line["table"], line["row"]) == ("defences", TRAINED)]
    columns = [*FEW_ATTACKS, "benign right", "over-refusal"]
    alone = [line for line in lines if line["table"] == "biases by model"]
    groups = (rows, [{**line, "row": f"{TRAINED}, as above"} for line in trained], alone)
    shown = [[row, *(cell(group, row, column) for column in columns)] for group in groups for row in distinct(group, "row")]
    return f"{head(rows)}.\n\n{markdown(['defence', *columns], shown)}"


LABELS = {
    "rosais": "best masks of the top RoSais layers",
    "random-layers": "best masks of random layers",
    "random-masks": "random masks",
}
TABLES = {
    "lab-attacks": attacks_table,
    "lab-defences": defences_table,
    "lab-models": models_table,
    "lab-biases": biases_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", help="training seeds of the models, separated by commas")
    parser.add_argument(
        "--prompts", type=int, help="prompts of each split (default: 48 for attacks, 24 for defences, 16 for biases)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="models at a time (default: 2)")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of models and campaigns")
    parser.add_argument(
        "--part", choices=list(PARTS), action="append", help="only this part; the other parts' figures stay as they are"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lab_results.csv"))
    parser.add_argument("--tables-only", action="store_true", help="run nothing: make the tables of what is finished")
    parser.add_argument("--dry-run", action="store_true", help="tiny settings, one model, nothing kept")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        seeds = [0] if args.dry_run else [int(part) for part in args.seeds.split(",")]
        runs = Path(scratch) if args.dry_run else args.runs
        parts = tuple(args.part or PARTS)
        num = 2 if args.dry_run else args.prompts
        prompts = PARTS if num is None else dict.fromkeys(PARTS, num)
        if not args.tables_only:
            # Two engines would else take the same core.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(lambda seed: run_model(seed, runs, prompts, parts, args.dry_run), seeds))
        rows = tabulate(seeds, runs, parts, prompts)
        about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit_of_tree()}
        rows = [about | row for row in rows]
        if not args.dry_run and args.out.exists():
            # The other parts' figures stay, with their date and commit.
            made = {row["table"] for row in rows}
            rows += [row for row in read_csv(args.out) if row["table"] not in made]
    for name, table in TABLES.items():
        print(f"\n{name}\n{table(rows)}")
    if not args.dry_run:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
