"""The one command for figures in documents: merge results into the committed CSV files, and rewrite every marked table from these.

    python benchmarks/tables.py                            # the tables of README.md and docs/ from benchmarks/results
    python benchmarks/tables.py runs/bench                 # after a benchmark here
    python benchmarks/tables.py call-1.tgz call-2.tgz      # after calls on a GPU: what came back

Each result is a folder or a .tgz of JSON-lines files, one a question. Where several measured the same thing (the same check, shape
or model), the last of them counts, and what none of them measured stays. A rehearsal is refused: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import floors
import kernel_speed
import lab_results
import language_results
import policy_serving
import ray_speed
import recipe_results
import routes_exact
import search_speed
import serving_cost
from common import NOT_MEASURED, ROOT, Rows, distinct, markdown, read_csv, read_rows, rewrite, spread, where, write_csv

# question -> the columns that say what a row measured
QUESTIONS = {
    "routes_exact": ("check", "mode"),
    "kernel_speed": ("shape", "num_tokens"),
    "serving_cost": ("model", "load", "variant"),
    "search_speed": ("model", "kind"),
    "floors": ("model", "kind", "workload"),
    "policy_serving": (),
    "ray_speed": (),
}


@dataclass(frozen=True, slots=True)
class Table:
    """A marked table.

    Attributes:
        question: the benchmark that it is made from.
        on_gpu: whether it shows rows measured on GPUs; each GPU gets a table of its own.
        make: rows -> Markdown.

    """

    question: str
    on_gpu: bool
    make: Callable[[Rows], str]


TABLES = {
    "gpu-checks": Table("routes_exact", True, routes_exact.table),
    "gpu-kernel": Table("kernel_speed", True, kernel_speed.short_table),
    "speed-table": Table("kernel_speed", True, kernel_speed.table),
    "serving-cost": Table("serving_cost", False, serving_cost.cpu_table),
    "gpu-serving": Table("serving_cost", True, serving_cost.gpu_table),
    "policy-serving": Table("policy_serving", False, policy_serving.table),
    "search-speed": Table("search_speed", False, search_speed.cpu_table),
    "ray-speed": Table("ray_speed", False, ray_speed.table),
    "gpu-search": Table("search_speed", True, search_speed.gpu_table),
    "gpu-profile": Table("floors", True, floors.table),
    **{mark: Table("lab_results", False, make) for mark, make in lab_results.TABLES.items()},
    **{mark: Table("language", False, make) for mark, make in language_results.TABLES.items()},
    **{mark: Table("recipes", False, make) for mark, make in recipe_results.TABLES.items()},
}


def load(source: Path) -> dict[str, Rows]:
    """question -> rows of one result; also of one that was cut off, as far as it came.

    Raises:
        SystemExit: it is a rehearsal's, or no result.

    """
    if source.is_dir():
        texts = {path.stem: path.read_text(encoding="utf-8") for path in source.glob("*.jsonl")}
    else:
        with tarfile.open(source) as packed:
            members = [item for item in packed.getmembers() if item.isfile() and item.name.endswith(".jsonl")]
            texts = {Path(item.name).stem: packed.extractfile(item).read().decode() for item in members}  # type: ignore[union-attr]
    found = {question: rows for question in QUESTIONS if (rows := read_rows(texts.get(question, "")))}
    if not found:
        raise SystemExit(f"{source} holds no result of a benchmark")
    if any(row.get("rehearsal") for rows in found.values() for row in rows):
        raise SystemExit(f"{source} is a rehearsal: its figures mean nothing and go into no table")
    return found


def csv_of(question: str, device: str, results: Path) -> Path:
    """The committed file of a question on a device."""
    name = "cpu" if "CPU cores" in device else re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return results / f"{question}_{name}.csv"


def merge(question: str, rows: Rows, results: Path) -> Path:
    """Write rows into the committed file; rows there of what was not measured now stay."""
    path = csv_of(question, rows[0]["device"], results)

    def subject(row: dict[str, object]) -> tuple[str, ...]:
        return tuple(str(row.get(name) or "") for name in QUESTIONS[question])  # as text, which a CSV file has

    new = {subject(row) for row in rows}
    kept = [row for row in read_csv(path) if subject(row) not in new] if path.exists() else []
    write_csv(path, [*({name: value for name, value in row.items() if name != "rehearsal"} for row in rows), *kept])
    return path


def tables(results: Path = ROOT / "benchmarks/results") -> dict[str, str]:
    """mark -> table, from the committed files."""
    made = {}
    for mark, table in TABLES.items():
        cpu = results / ("lab_results.csv" if table.question == "lab_results" else f"{table.question}_cpu.csv")
        paths = gpu_files(table.question, results) if table.on_gpu else [cpu]
        shown = [table.make(read_csv(path)) for path in paths if path.exists()]
        made[mark] = "\n\n".join(shown) or NOT_MEASURED
    return made | {"gpu": gpu_summary(results)}


def gpu_files(question: str, results: Path) -> list[Path]:
    """The committed files of a question, one a GPU."""
    return sorted(set(results.glob(f"{question}_*.csv")) - {results / f"{question}_cpu.csv"})


def gpu_summary(results: Path) -> str:
    """The README's few lines, a column for each GPU; what was not measured says so."""
    rows = {name: [row for path in gpu_files(name, results) for row in read_csv(path)] for name in QUESTIONS}
    shown = [row for name in ("routes_exact", "serving_cost", "search_speed") for row in rows[name]]
    devices = distinct(shown, "device")
    if not devices:
        return NOT_MEASURED
    models = distinct(rows["search_speed"], "model")
    columns = [summary_cells({name: of(device, rows[name]) for name in rows}, models) for device in devices]
    table = markdown(["on a GPU", *devices], [[what, *(column[what] for column in columns)] for what in columns[0]])
    return "\n\n".join([table, *(where(of(device, shown)) for device in devices)])


def of(device: str, rows: Rows) -> Rows:
    """Rows measured there."""
    return [row for row in rows if row["device"] == device]


def summary_cells(rows: dict[str, Rows], models: Sequence[str]) -> dict[str, str]:
    """What -> figure, of the rows of one GPU; the same things for all."""
    checks = rows["routes_exact"]
    cells = {"checks passed": f"{sum(row['result'] == 'pass' for row in checks)} of {len(checks)}" if checks else NOT_MEASURED}
    for variant in ("idle", "policy", "plans", "fused"):
        mine = [row for row in rows["serving_cost"] if row["variant"] == variant and row["load"].startswith("decode")]
        what = f"tokens/s in decoding against stock vLLM, {serving_cost.VARIANTS[variant]}: median (range) of all rounds"
        cells[what] = spread([float(row["ratio_to_stock"]) for row in mine], 3, 2)
    for model in models:
        mine = [row for row in rows["search_speed"] if row["model"] == model]
        ours = {row["variant"]: row["ratio_to_published"] for row in mine if row["variant"].startswith("cells")}
        shown = ", ".join(f"{float(ratio):.0f} ({variant.split()[1]})" for variant, ratio in ours.items())
        cells[f"candidates/s over those of the published way, {model} (prompts in flight)"] = shown or NOT_MEASURED
        whole = [row["ratio_to_published"] for row in mine if row["kind"] == "whole run"]
        cells[f"a whole F-SOUR attempt alone, {model}"] = f"{float(whole[-1]):.0f} times as fast" if whole else NOT_MEASURED
    return cells


def documents(root: Path = ROOT) -> list[Path]:
    """Where marks are looked for."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("sources", type=Path, nargs="*", metavar="RESULT", help="folder or .tgz of a benchmark or a GPU call")
    options.add_argument("--root", type=Path, default=ROOT, help="tree whose results and documents are written (default: this one)")
    args = options.parse_args()
    results = args.root / "benchmarks/results"
    # All are read before anything is written, so that a refused one changes nothing.
    for found in [load(source) for source in args.sources]:
        for question, rows in found.items():
            print(merge(question, rows, results))
    for mark, table in tables(results).items():
        places = [str(path) for path in documents(args.root) if rewrite(path, mark, table)]
        print(f"{mark}: {', '.join(places) or 'no document has its marks'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
