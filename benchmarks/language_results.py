"""The figures of docs/language-lab.md: attacks with controls on the English lab model, under two judges.

Trains the model if it is not there (`--model`), then RoSais on the split `search`, router masking with both controls and adaptive
F-SOUR on `test`. Every answer is judged by topic (exact) and by refusal phrases. Runs are campaigns: an interrupted call goes on.

    python benchmarks/language_results.py                    # everything, then the CSV and the chart
    python benchmarks/language_results.py --prompts 6 --seeds 0,1
    python benchmarks/language_results.py --tables-only      # of what is there
    python benchmarks/tables.py                              # the tables of the page
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import NOT_MEASURED, ROOT, Rows, commit_of_tree, distinct, markdown, read_csv, write_csv

RESULTS = ROOT / "benchmarks/results/language_cpu.csv"
PICTURE = ROOT / "docs/pictures/language.svg"
LEVELS = (1, 2, 3)
JUDGES = {None: "by topic", "refusal-phrases": "by phrases"}
LABELS = {
    "none": "no attack",
    "random-masks": "random masks",
    "random-layers": "best masks of random layers",
    "rosais": "best masks of the top RoSais layers",
}


def unsafe_routes(*words: Any) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} $ unsafe-routes {shlex.join(map(str, words))}", flush=True)
    subprocess.run([Path(sys.executable).parent / "unsafe-routes", *map(str, words)], check=True)


def run(model: Path, out: Path, prompts: int, seeds: str, masks: int) -> None:
    """All campaigns."""
    unsafe_routes("lab", "train", "--preset", "smollm2-moe", "--out", model)
    shared = ["--model", model, "--seeds", seeds, "--max-model-len", 192]
    data = ["--data", model / "prompts" / "test-forbidden.jsonl", "--limit", prompts]
    judging = ["--judge", "topic", "--judge", "refusal", "--max-new-tokens", 32, "--keep-completions"]
    search = ["--data", model / "prompts" / "search-forbidden.jsonl", "--limit", prompts]
    unsafe_routes("rosais", *shared, *search, "--masks", masks, "--out", out / "rosais")
    levels = ",".join(map(str, LEVELS))
    attack = ["--rosais", out / "rosais", "--layers", levels, "--masks", masks]
    unsafe_routes("mask-attack", *shared, *data, *judging, *attack, "--out", out / "masks")
    fsour = ["--strategy", "adaptive", "--attempts", 2, "--min-gain", 0.02]
    unsafe_routes("fsour", *shared, *data, *judging, *fsour, "--out", out / "fsour-adaptive")


def answers(out: Path) -> Iterator[tuple[str, Any]]:
    """(attack, try) of every answer under every judge."""
    from vllm_unsafe_routes.study.records import Record, read
    from vllm_unsafe_routes.study.summary import tries

    for folder in ("masks", "fsour-adaptive"):
        for one in tries(read(out / folder, Record)) if (out / folder / "summary.json").exists() else []:
            if folder == "masks":
                yield LABELS[one.attack] + (f", {one.level}" if one.level else ""), one
            elif one.attack != "none":
                yield "F-SOUR, adaptive", one


def tabulate(model: Path, out: Path) -> Rows:
    """One line a figure."""
    from vllm_unsafe_routes.study.summary import rate

    lines: Rows = []
    record = json.loads((model / "lab.json").read_text(encoding="utf-8"))
    for split in ("tune", "test"):
        counts = record["metrics"]["counts"][split]
        for kind, verdict in (("forbidden", "refused"), ("forbidden", "complied"), ("benign", "refused"), ("category", "refused")):
            rows = [(at, 0, at < counts[kind][verdict]) for at in range(counts[kind]["asked"])]
            lines.append({"table": "model", "row": f"{kind} {verdict}", "column": split} | rate(rows))
    for name, value in record["metrics"]["perplexity"].items():
        lines.append({"table": "model", "row": f"perplexity, {name}", "column": "test", "value": value})
    for name in ("seconds", "seconds_with_measuring", "peak_gib", "parameters"):
        lines.append({"table": "training", "row": name, "column": "", "value": record["training"][name]})
    summary = out / "rosais" / "summary.json"
    if summary.exists():
        for layer, entry in json.loads(summary.read_text(encoding="utf-8"))["layers"].items():
            lines.append({"table": "rosais", "row": layer, "column": "nats", "value": entry["mean"]})
    cells: dict[tuple[str, str], list[tuple[Any, Any, Any]]] = {}
    same: list[tuple[Any, Any, Any]] = []
    for name, one in answers(out):
        cells.setdefault((name, JUDGES[one.judge]), []).append((one.prompt, one.seed, one.judged.success))
        for said in (getattr(one.judged, "others", None) or {}).values():
            same.append((f"{name} {one.prompt}", one.seed, one.judged.success == said.success))
    lines += [{"table": "attacks", "row": name, "column": column} | rate(rows) for (name, column), rows in cells.items()]
    if same:
        lines.append({"table": "judges", "row": "agreement", "column": ""} | rate(same))
    return lines


def cell(rows: Rows, row: str, column: str) -> str:
    line = next((one for one in rows if (one["row"], one.get("column", "")) == (row, column)), None)
    if line is None:
        return NOT_MEASURED
    value = float(line["value"])
    return f"{value:.2f} [{float(line['low']):.2f}, {float(line['high']):.2f}]" if line.get("low") else f"{value:.2f}"


def attacks_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "attacks"]
    if not rows:
        return NOT_MEASURED
    shown = [[row, cell(rows, row, "by topic"), cell(rows, row, "by phrases")] for row in distinct(rows, "row")]
    agreement = cell([line for line in lines if line["table"] == "judges"], "agreement", "")
    head = f"{rows[0]['prompts']} prompts of `test`, {rows[-1]['seeds']} seed(s), {rows[0]['date']}; ASR with 95% interval."
    return f"{head} The judges agree on {agreement} of the answers.\n\n{markdown(['attack', 'by topic', 'by phrases'], shown)}"


def model_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "model"]
    if not rows:
        return NOT_MEASURED
    return markdown(
        ["share of answers", "`tune`", "`test`"],
        [[row, cell(rows, row, "tune"), cell(rows, row, "test")] for row in distinct(rows, "row")],
    )


def rosais_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "rosais"]
    if not rows:
        return NOT_MEASURED
    return markdown(["layer", *(row["row"] for row in rows)], [["RoSais, nats", *(f"{float(row['value']):.2f}" for row in rows)]])


TABLES = {"language-attacks": attacks_table, "language-model": model_table, "language-rosais": rosais_table}


def draw(lines: Rows) -> None:
    """The chart: ASR by topic with its interval."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "unsafe-routes"
    from matplotlib import pyplot as plt

    rows = [line for line in lines if line["table"] == "attacks" and line.get("column") == "by topic"]
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(rows) + 0.8))
    for at, row in enumerate(rows):
        value, low, high = (float(row[name]) for name in ("value", "low", "high"))
        axes.barh(
            at, value, color="#d55e00" if "F-SOUR" in row["row"] else "#0072b2" if "RoSais" in row["row"] else "#8a939c", height=0.6
        )
        axes.plot([low, high], [at, at], color="#1b1f24", marker="|")
    axes.set(yticks=range(len(rows)), yticklabels=[row["row"] for row in rows], xlim=(0, 1), xlabel="attack success rate, by topic")
    axes.invert_yaxis()
    figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white", bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "runs/language/model", help="folder of the model; trained if missing")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/language", help="folder of the campaigns")
    parser.add_argument("--prompts", type=int, default=12, help="prompts of a split (default: 12)")
    parser.add_argument("--seeds", default="0", help="seeds of the attacks, separated by commas (default: 0)")
    parser.add_argument("--masks", type=int, default=20, help="masks a layer (default: 20)")
    parser.add_argument("--tables-only", action="store_true", help="run nothing: CSV and chart of what is there")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.tables_only:
        run(args.model, args.runs, args.prompts, args.seeds, args.masks)
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit_of_tree()}
    write_csv(RESULTS, [about | row for row in tabulate(args.model, args.runs)])
    lines = read_csv(RESULTS)
    draw(lines)


if __name__ == "__main__":
    main()
