"""One prepared call on a GPU host: unpack an engine, lay out the project beside it, then one part after another by its deadline.

    UNSAFE_ROUTES_COMMIT=abc1234 python3 benchmarks/gpu_call.py 1      # checks, kernel, serving: 345 s
    UNSAFE_ROUTES_COMMIT=abc1234 python3 benchmarks/gpu_call.py 2      # search, profile: 390 s
    python3 benchmarks/gpu_call.py 1 --rehearse                        # every step on CPU, tiny; no figure counts

Instead of call 2: `eager` if routes are exact without graphs only, `again` if no engine started in call 1 and the fault is mended.
The host needs what docs/gpu.md lists, and no network. Everything measured is one file, `call-<name>.tgz`, copied to the folder that
the environment variable OUT names (else to runs/gpu) every ten seconds and at the end; `benchmarks/tables.py` reads it. The exit
status is 0 only if every part ended well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, append, facts, lay_out, read_rows

GRACE = 8.0
COPY_EVERY = 10.0
LOG_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class Part:
    """One benchmark of a call.

    Attributes:
        until: seconds after the call's start at which it is ended; it is told to be done `GRACE` seconds before.
        script: file in benchmarks/.
        words: its arguments.

    """

    until: float
    script: str
    words: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.script.removesuffix('.py')} {self.words}"


CHECKS = "--jobs 6 --only kernels,replays,identity,exact-olmoe,agree-olmoe,exact-deepseek_v2_lite"
SHAPES = "OLMoE,DeepSeek-V2-Lite,Mixtral,DeepSeek-V3"
SERVING = "--models olmoe --engines routes,policy,fused --rounds 99"
# Eager engines start soonest, and cells replay no graph.
SEARCH = "--mode eager --agreed --rounds 1 --only"
OLMOE = f"--models olmoe {SEARCH} cells-1-,cells-16-,cells-128-,engine-16-"
DEEPSEEK = f"--models deepseek_v2_lite {SEARCH} cells-1-,cells-64-"
# Serving's rounds go on until the time is up.
CALLS = {
    "1": (
        Part(155, "routes_exact.py", CHECKS),
        Part(205, "kernel_speed.py", f"--only {SHAPES}"),
        Part(345, "serving_cost.py", SERVING),
    ),
    "2": (
        Part(110, "search_speed.py", OLMOE),
        Part(255, "search_speed.py", DEEPSEEK),
        Part(390, "floors.py", "--models olmoe"),
    ),
    "eager": (
        Part(100, "serving_cost.py", f"{SERVING} --mode eager"),
        Part(175, "search_speed.py", OLMOE),
        Part(300, "search_speed.py", DEEPSEEK),
    ),
    "again": (
        Part(130, "routes_exact.py", CHECKS),
        Part(320, "serving_cost.py", SERVING),
    ),
}


class Call:
    """A call under way.

    Args:
        name: key of `CALLS`.
        rehearse: tiny shapes on CPU.
        scratch: folder for unpacked files, models and logs.
        out: folder that the results are copied to.

    """

    def __init__(self, name: str, rehearse: bool, scratch: Path, out: Path) -> None:
        self.name, self.rehearse, self.scratch, self.out = name, rehearse, scratch, out
        self.results = scratch / "results"
        self._began = time.monotonic()
        self._running: subprocess.Popen[bytes] | None = None
        for folder in (self.results, out):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds(self) -> float:
        """Since the start."""
        return round(time.monotonic() - self._began, 1)

    def step(self, what: str, **details: object) -> None:
        """Note that something begins or ends."""
        append(self.results / "steps.jsonl", {"at": self.seconds, "question": "call", "step": what, **details})
        print(f"[{self.seconds:6.1f} s] {what} {' '.join(f'{key}={value}' for key, value in details.items())}".rstrip(), flush=True)

    def install(self, engine: str) -> None:
        """Put the engine and the project on the import path of this process and of every part.

        Raises:
            SystemExit: `engine` is not an archive of pack_engine.py.

        """
        folders = [lay_out(ROOT, self.scratch / "project")]
        if engine != "installed":
            with tarfile.open(engine) as packed:
                packed.extractall(self.scratch / "engine", filter="data")
            folders.append(self.scratch / "engine/site")
            if not (folders[-1] / "vllm").is_dir():
                raise SystemExit(f"{engine} holds no site/vllm: it was not made by pack_engine.py")
        self.step("unpacked")
        # Without it every engine process compiles vLLM's files anew: 35 to 60 s instead of 12.
        subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", *map(str, folders)], stdout=subprocess.DEVNULL)
        sys.path[1:1] = map(str, folders)
        os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ.setdefault("TRITON_CACHE_DIR", str(self.scratch / "triton"))
        about = facts(on_gpu=not self.rehearse)
        self.step("installed", **about)
        if about["device"] == "none":
            raise SystemExit("no GPU here: --rehearse runs every step on CPU")

    def run(self, part: Part) -> bool:
        """One part in a process group of its own; True if it ended well and in time."""
        left = part.until - self.seconds
        if left < GRACE + 2:
            self.step("part not run: no time left", part=part.name)
            return False
        words = [
            *part.words.split(),
            "--device",
            "cuda",
            "--seconds",
            f"{left - GRACE:.1f}",
            *(["--rehearse"] if self.rehearse else []),
        ]
        folders = ["--out", str(self.results), "--scratch", str(self.scratch)]
        self.step("part begins", part=part.name, until=part.until)
        command = [sys.executable, str(ROOT / "benchmarks" / part.script), *words, *folders]
        self._running = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        try:
            status = "ok" if self._running.wait(left) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "cut off"
        self.end_part()
        self.step(f"part {status}", part=part.name)
        return status == "ok"

    def end_part(self) -> None:
        """End the running part, children that outlived it included."""
        process, self._running = self._running, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def copy_out(self) -> None:
        """Results and the ends of all logs as one file; whoever looks sees a whole one."""
        packed = self.scratch / "call.tgz"
        with tarfile.open(packed, "w:gz") as archive:
            archive.add(self.results, "results")
            for log in sorted(self.scratch.glob("*.log")):
                text = log.read_bytes()[-LOG_BYTES:]
                member = tarfile.TarInfo(f"logs/{log.name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
        target = self.out / f"call-{self.name}.tgz"
        shutil.copy(packed, target.with_suffix(".part"))
        target.with_suffix(".part").replace(target)

    def copy_until(self, end: threading.Event) -> None:
        """Copy the results out again and again."""
        while not end.wait(COPY_EVERY):
            self.copy_out()


def short_tables(call: Call) -> str:
    """What a call prints last."""
    from tables import TABLES

    lines = ["REHEARSAL on CPU: every figure below means nothing"] if call.rehearse else []
    for mark, table in TABLES.items():
        path = call.results / f"{table.question}.jsonl"
        if table.on_gpu and path.exists() and mark != "speed-table":
            lines.append(f"\n== {mark}\n{table.make(read_rows(path.read_text()))}")
    return "\n".join(lines)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("call", choices=CALLS, metavar="CALL", help=", ".join(CALLS))
    options.add_argument("--engine", help='an archive of pack_engine.py or "installed" (default: build/engine.tar.xz)')
    options.add_argument("--rehearse", action="store_true", help="every step on CPU with tiny shapes and the installed engine")
    options.add_argument("--slower", type=float, default=1.0, help="deadlines of a rehearsal times this, for a busy machine")
    options.add_argument("--scratch", type=Path, help="folder for unpacked files and models (default: a temporary one)")
    args = options.parse_args()
    scratch = (args.scratch or Path(tempfile.mkdtemp(prefix="unsafe-routes-call-"))).resolve()
    call = Call(args.call, args.rehearse, scratch, Path(os.environ.get("OUT") or ROOT / "runs/gpu").resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    ended = threading.Event()
    copier = threading.Thread(target=call.copy_until, args=(ended,), daemon=True)
    copier.start()
    passed = []
    try:
        call.install(args.engine or ("installed" if args.rehearse else str(ROOT / "build/engine.tar.xz")))
        for part in CALLS[args.call]:
            passed.append(call.run(Part(part.until * args.slower, part.script, part.words)))
        call.step("ends", parts_passed=f"{sum(passed)} of {len(CALLS[args.call])}")
    finally:
        call.end_part()
        ended.set()
        copier.join()
        call.copy_out()
    print(short_tables(call), flush=True)
    return 0 if passed and all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
