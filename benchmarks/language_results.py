"""The figures of docs/language-lab.md: attacks with controls and defences on the English lab model, under two judges.

Trains the model if it is not there (`--model`). Then, part by part:

- `attacks`: RoSais on the split `search`, router masking with both controls, and adaptive F-SOUR on `test`;
- `defences`: F-SOUR and suffixes, searched again under prompt defences and under a policy that is derived on `search` and `tune`;
  on fewer prompts (`--few`) and with fewer candidates;
- `strategies`: F-SOUR as published, on as few prompts and with one seed;
- `dataset`: one set of masks for all prompts, chosen on `search`;
- `presets`, only if named: trains the other two presets' models; their default answers, RoSais and F-SOUR, on few prompts.

Every answer is judged by topic (exact) and by refusal phrases. Runs are campaigns: an interrupted call goes on.

    python benchmarks/language_results.py                    # all but the presets, then the CSV and the chart
    python benchmarks/language_results.py --part presets     # as long again
    python benchmarks/language_results.py --part attacks --prompts 6 --seeds 0,1
    python benchmarks/language_results.py --tables-only      # of what is there
    python benchmarks/tables.py                              # the tables of the page
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import NOT_MEASURED, ROOT, Rows, commit_of_tree, distinct, markdown, read_csv, write_csv
from lab_results import rule_of

RESULTS = ROOT / "benchmarks/results/language_cpu.csv"
PICTURE = ROOT / "docs/pictures/language.svg"
LEVELS = (1, 2, 3)
DEFAULT_PARTS = ("attacks", "defences", "strategies", "dataset")
PARTS = (*DEFAULT_PARTS, "presets")
PRESETS = ("control", "robust")
DERIVE = shlex.split("--rule protect --rule effect --bans 2 --protections 1 --no-suffix --keep 1 --budget 0.9")
MATRIX = shlex.split("--attack none --attack fsour-adaptive --attack suffix --attack suffix-transfer --suffix-rounds 1")
ADAPTIVE = ("--strategy", "adaptive", "--attempts", 2)
# Of the dense model, in a model's folder.
ANSWERS = "dense-answers.jsonl"
JUDGES = {None: "by topic", "refusal-phrases": "by phrases"}
LABELS = {
    "none": "no attack",
    "rosais": "best masks of the top RoSais layers",
    "random-layers": "best masks of random layers",
    "random-masks": "random masks",
}


def run_counted(words: Sequence[Any]) -> float:
    """Run a command; returns the peak memory of its largest process, GiB.

    Raises:
        CalledProcessError: it failed.

    """
    process = subprocess.Popen([str(word) for word in words])
    try:
        _, status, used = os.wait4(process.pid, 0)
    except KeyboardInterrupt:
        process.wait()  # it was interrupted too, and keeps what it has
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return float(used.ru_maxrss / 2**20)


class Campaigns:
    """The commands of every part.

    Args:
        args: the command line.

    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._model, self._out = args, args.model, args.runs
        self._first_seed = args.seeds.split(",")[0]
        self._judging = ["--judge", "topic", "--judge", "refusal", "--max-new-tokens", 32]
        self._masks = ["--masks", args.masks]
        self._peak = 0.0

    def run(self, parts: Sequence[str]) -> None:
        """Train and run; time and memory of each part go to `usage.json`."""
        self._out.mkdir(parents=True, exist_ok=True)
        self._unsafe_routes("lab", "train", "--preset", "smollm2-moe", "--out", self._model)
        for part in parts:
            with self.counted(part):
                getattr(self, part)()

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Add time and peak memory of what runs within to a part's, also where it is interrupted."""
        started, self._peak = time.monotonic(), 0.0
        try:
            yield
        finally:
            used = self._out / "usage.json"
            usage = json.loads(used.read_text(encoding="utf-8")) if used.exists() else {}
            before = usage.get(part, {"seconds": 0, "peak_gib": 0.0})
            seconds = round(time.monotonic() - started + before["seconds"])
            usage[part] = {"seconds": seconds, "peak_gib": max(round(self._peak, 1), before["peak_gib"])}
            used.write_text(json.dumps(usage, indent=2) + "\n", encoding="utf-8")

    def _unsafe_routes(self, *words: Any) -> None:
        print(f"{datetime.now(UTC):%H:%M:%S} $ unsafe-routes {shlex.join(map(str, words))}", flush=True)
        self._peak = max(self._peak, run_counted([Path(sys.executable).parent / "unsafe-routes", *words]))

    def _on(self, model: Path, *, first_seed: bool = False) -> list[Any]:
        return ["--model", model, "--max-model-len", 192, "--seeds", self._first_seed if first_seed else self._args.seeds]

    def _data(self, split: str, few: bool = False, model: Path | None = None) -> list[Any]:
        count = self._args.few if few else self._args.prompts
        return ["--data", (model or self._model) / "prompts" / f"{split}-forbidden.jsonl", "--limit", count]

    def _rosais(self, model: Path, name: str) -> None:
        data = self._data("search", model=model)
        self._unsafe_routes("rosais", *self._on(model), *data, *self._masks, "--out", self._out / name)

    def _fsour(self, name: str, *more: Any, model: Path | None = None, split: str = "test", few: bool = True, **on: bool) -> None:
        model = model or self._model
        self._unsafe_routes(
            *["fsour", *self._on(model, **on), *self._data(split, few, model), *self._judging, "--keep-completions"],
            *["--min-gain", 0.02, *more, "--out", self._out / name],
        )

    def attacks(self) -> None:
        self._rosais(self._model, "rosais")
        self._mask_attack("masks", [])
        self._fsour("fsour-adaptive", *ADAPTIVE, few=False)

    def dataset(self) -> None:
        chosen = self._model / "prompts" / "search-forbidden.jsonl"
        self._mask_attack("masks-dataset", ["--chosen-on", chosen, "--chosen-limit", self._args.prompts])

    def _mask_attack(self, name: str, more: list[Any]) -> None:
        self._unsafe_routes(
            *["mask-attack", *self._on(self._model), *self._data("test"), *self._judging, "--keep-completions", *self._masks],
            *["--rosais", self._out / "rosais", "--layers", ",".join(map(str, LEVELS)), *more, "--out", self._out / name],
        )

    def strategies(self) -> None:
        for strategy in ("paper", "code"):
            self._fsour(f"fsour-{strategy}", "--strategy", strategy, "--attempts", 1, first_seed=True)

    def defences(self) -> None:
        self._fsour("fsour-search", *ADAPTIVE, split="search", first_seed=True)
        search = [*self._judging, "--min-gain", 0.02, "--adaptive-max-candidates", 300]
        self._unsafe_routes(
            *["derive-policy", self._out / "rosais", self._out / "fsour-search", *self._on(self._model, first_seed=True), *search],
            *[*self._data("tune", few=True), *self._harmless("tune"), *DERIVE, "--attempts", 1, "--out", self._out / "policy"],
        )
        names = ["none", "reminder", "prefix", *(f"policy:{self._out / 'policy' / name}.json" for name in ("policy", "control-0"))]
        self._unsafe_routes(
            *["evaluate", *self._on(self._model, first_seed=True), *search, *self._data("test", few=True), *self._harmless("test")],
            *[*MATRIX, *(word for name in names for word in ("--defence", name)), "--attempts", 2, "--out", self._out / "matrix"],
        )

    def _harmless(self, split: str) -> list[Any]:
        prompts = self._model / "prompts"
        sources = ["--benign", prompts / f"{split}-benign.jsonl", "--benign-like", prompts / f"{split}-category.jsonl"]
        return [*sources, "--utility-limit", 32]

    def presets(self) -> None:
        for preset in PRESETS:
            model = self._model.parent / preset
            model.mkdir(exist_ok=True)
            # The dense model and the questions are the same.
            if not (model / ANSWERS).exists():
                shutil.copy(self._model / ANSWERS, model)
            self._unsafe_routes("lab", "train", "--preset", f"smollm2-moe-{preset}", "--out", model)
            self._rosais(model, f"rosais-{preset}")
            self._fsour(f"fsour-{preset}", *ADAPTIVE, model=model)


def answers(out: Path) -> Iterator[tuple[str, Any]]:
    """(attack, try) of every answer under every judge."""
    for folder in ("masks", "masks-dataset"):
        kind = ", one for all prompts" if folder == "masks-dataset" else ""
        found = [one for one in finished(out / folder) if not (kind and one.attack == "none")]
        order = {f"{attack}{end}": at for at, attack in enumerate(LABELS) for end in ("", "-dataset")}
        for one in sorted(found, key=lambda one: (order[one.attack], one.level or 0)):
            yield LABELS[one.attack.removesuffix("-dataset")] + (f", {one.level}" if one.level else "") + kind, one
    for kind in ("adaptive", "paper", "code", *PRESETS):
        for one in finished(out / f"fsour-{kind}"):
            if one.attack != "none":
                yield f"F-SOUR, adaptive, preset {kind}" if kind in PRESETS else f"F-SOUR, {kind}", one


def finished(folder: Path) -> list[Any]:
    """The tries of a campaign that has ended."""
    from vllm_unsafe_routes.study.records import Record, read
    from vllm_unsafe_routes.study.summary import tries

    return list(tries(read(folder, Record))) if (folder / "summary.json").exists() else []


def defences(out: Path) -> Rows:
    """The matrix of attacks by defences, and utility; of those defences under which all is done."""
    from vllm_unsafe_routes.study.records import Matrix, Record, Throughput, Utility, read
    from vllm_unsafe_routes.study.summary import rate, utility_row

    cells: dict[tuple[str, str], list[Any]] = {}
    records = list(read(out / "matrix", Record)) if (out / "matrix" / "records.jsonl").exists() else []
    done = {record.defence for record in records if isinstance(record, Throughput)}  # measured last
    for record in records:
        if isinstance(record, Matrix | Utility) and record.defence not in done:
            continue
        if isinstance(record, Matrix):
            cells.setdefault((policy_name(record.defence), record.attack), []).append((record.prompt, record.seed, record.success))
        elif isinstance(record, Utility):
            column, kind = ("benign right", "right") if record.kind == "benign" else ("over-refusal", "refused")
            cells.setdefault((policy_name(record.defence), column), []).append(utility_row(record, kind))
    lines: Rows = [{"table": "defences", "row": row, "column": column} | rate(found) for (row, column), found in cells.items()]
    policy = out / "policy"
    if cells and (policy / "policy.json").exists():
        lines.append({"table": "policy", "row": rule_of(policy)})
    return lines


def policy_name(name: str) -> str:
    name = re.sub(r"policy:\S*control-\d+\.json", "random experts, equal size", name)
    return re.sub(r"policy:\S*policy\.json", "derived policy", name)


def model_rows(model: Path, name: str = "") -> Rows:
    """What a model refuses and answers, and how it was trained.

    Args:
        model: its folder.
        name: goes before the names of the tables, for presets.

    """
    from vllm_unsafe_routes.lab.english import topics
    from vllm_unsafe_routes.study.summary import rate

    lines: Rows = []
    record = json.loads((model / "lab.json").read_text(encoding="utf-8"))
    for split in ("tune", "test"):
        counts = record["metrics"]["counts"][split]
        for kind, verdict in (("forbidden", "refused"), ("forbidden", "complied"), ("benign", "refused"), ("category", "refused")):
            rows = [(at, 0, at < counts[kind][verdict]) for at in range(counts[kind]["asked"])]
            lines.append({"table": f"{name}model", "row": f"{kind} {verdict}", "column": split} | rate(rows))
        unseen = [record["metrics"]["counts"][split]["groups"].get(group, [0, 0]) for group in topics.UNSEEN]
        refused, asked = (sum(pair[at] for pair in unseen) for at in (0, 1))
        if asked:
            rows = [(at, 0, at < refused) for at in range(asked)]
            lines.append({"table": f"{name}model", "row": "benign refused, groups not in tuning", "column": split} | rate(rows))
    for words, value in record["metrics"]["perplexity"].items():
        lines.append({"table": f"{name}model", "row": f"perplexity, {words}", "column": "test", "value": value})
    for key in ("seconds", "seconds_with_measuring", "peak_gib", "parameters"):
        lines.append({"table": f"{name}training", "row": key, "column": "", "value": record["training"][key]})
    return lines


def tabulate(model: Path, out: Path) -> Rows:
    """One line a figure."""
    from vllm_unsafe_routes.study.summary import rate

    lines = model_rows(model)
    for preset in PRESETS:
        if (model.parent / preset / "lab.json").exists():
            lines += model_rows(model.parent / preset, f"{preset} ")
    for name in ("", *PRESETS):
        summary = out / (f"rosais-{name}" if name else "rosais") / "summary.json"
        if summary.exists():
            for layer, entry in json.loads(summary.read_text(encoding="utf-8"))["layers"].items():
                lines.append({"table": "rosais", "row": layer, "column": name or "smollm2-moe", "value": entry["mean"]})
    usage = out / "usage.json"
    for part, entry in json.loads(usage.read_text(encoding="utf-8")).items() if usage.exists() else ():
        lines += [{"table": "usage", "row": part, "column": key, "value": value} for key, value in entry.items()]
    cells: dict[tuple[str, str], list[tuple[Any, Any, Any]]] = {}
    same: list[tuple[Any, Any, Any]] = []
    for name, one in answers(out):
        cells.setdefault((name, JUDGES[one.judge]), []).append((one.prompt, one.seed, one.judged.success))
        for said in (getattr(one.judged, "others", None) or {}).values():
            same.append((f"{name} {one.prompt}", one.seed, one.judged.success == said.success))
    lines += [{"table": "attacks", "row": name, "column": column} | rate(rows) for (name, column), rows in cells.items()]
    if same:
        lines.append({"table": "judges", "row": "agreement", "column": ""} | rate(same))
    return lines + defences(out)


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
    tried = {row["row"]: f"{row['prompts']} x {row['seeds']}" for row in rows}
    shown = [[row, cell(rows, row, "by topic"), cell(rows, row, "by phrases"), tried[row]] for row in distinct(rows, "row")]
    agreement = cell([line for line in lines if line["table"] == "judges"], "agreement", "")
    head = f"On `test`, {rows[0]['date']}; ASR with 95% interval. The judges agree on {agreement} of the answers."
    return f"{head}\n\n{markdown(['attack', 'by topic', 'by phrases', 'prompts x seeds'], shown)}"


def model_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "model"]
    if not rows:
        return NOT_MEASURED
    return markdown(
        ["share of answers", "`tune`", "`test`"],
        [[row, cell(rows, row, "tune"), cell(rows, row, "test")] for row in distinct(rows, "row")],
    )


def presets_table(lines: Rows) -> str:
    columns = {"forbidden refused": "forbidden refused", "benign refused": "benign refused", "category refused": "category refused"}
    shown = []
    for name in ("", *(f"{preset} " for preset in PRESETS)):
        rows = [line for line in lines if line["table"] == f"{name}model"]
        if rows:
            attack = f"F-SOUR, adaptive, preset {name.strip()}" if name else "F-SOUR, adaptive"
            found = cell([line for line in lines if line["table"] == "attacks"], attack, "by topic")
            shown.append([f"smollm2-moe{'-' if name else ''}{name.strip()}", *(cell(rows, row, "test") for row in columns), found])
    return markdown(["preset", *columns, "F-SOUR, adaptive"], shown) if shown else NOT_MEASURED


def rosais_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "rosais"]
    if not rows:
        return NOT_MEASURED
    layers = distinct(rows, "row")
    shown = [[name, *(cell(rows_of(rows, name), layer, name) for layer in layers)] for name in distinct(rows, "column")]
    return markdown(["RoSais, nats, by layer", *layers], shown)


def rows_of(rows: Rows, column: str) -> Rows:
    return [row for row in rows if row["column"] == column]


def defences_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "defences"]
    if not rows:
        return NOT_MEASURED
    names = distinct(rows, "column")
    shown = [[row, *(cell(rows, row, name) for name in names)] for row in distinct(rows, "row")]
    counts = ", ".join(f"{name} {next(row['prompts'] for row in rows_of(rows, name))}" for name in names)
    rule = "".join(f" The deriver chose `{line['row']}`." for line in lines if line["table"] == "policy")
    return f"{rows[0]['date']}; prompts of `test`: {counts}.{rule}\n\n{markdown(['defence', *names], shown)}"


def cost_table(lines: Rows) -> str:
    rows = [line for line in lines if line["table"] == "usage"]
    training = {line["row"]: float(line["value"]) for line in lines if line["table"] == "training"}
    used = [("training, with measuring", training["seconds_with_measuring"], training["peak_gib"])]
    for part in distinct(rows, "row"):
        seconds, peak = (next(float(row["value"]) for row in rows if (row["row"], row["column"]) == (part, key)) for key in USAGE)
        used.append((part, seconds, peak))
    used.append(("all", sum(seconds for _, seconds, _ in used), max(peak for _, _, peak in used)))
    shown = [[part, f"{seconds / 60:.0f}", f"{peak:.1f}"] for part, seconds, peak in used]
    return markdown(["part", "minutes", "peak GiB of one process"], shown)


USAGE = ("seconds", "peak_gib")
TABLES = {
    "language-attacks": attacks_table,
    "language-model": model_table,
    "language-rosais": rosais_table,
    "language-presets": presets_table,
    "language-defences": defences_table,
    "language-cost": cost_table,
}


def draw(lines: Rows) -> None:
    """The chart: ASR by topic with its interval."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "unsafe-routes"
    from matplotlib import pyplot as plt

    rows = [line for line in lines if line["table"] == "attacks" and line.get("column") == "by topic"]
    if not rows:
        return
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
    parser.add_argument("--prompts", type=int, default=36, help="prompts of a split (default: 36)")
    parser.add_argument("--seeds", default="0,1", help="seeds of the attacks, separated by commas (default: 0,1)")
    parser.add_argument("--masks", type=int, default=20, help="masks a layer (default: 20)")
    parser.add_argument("--few", type=int, default=8, help="prompts of strategies, defences and presets (default: 8)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this; may be repeated (default: all but presets)")
    parser.add_argument("--tables-only", action="store_true", help="run nothing: CSV and chart of what is there")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.tables_only:
        Campaigns(args).run(args.part or DEFAULT_PARTS)
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit_of_tree()}
    write_csv(RESULTS, [about | row for row in tabulate(args.model, args.runs)])
    lines = read_csv(RESULTS)
    draw(lines)


if __name__ == "__main__":
    main()
