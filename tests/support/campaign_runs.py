"""Real `unsafe-routes` processes on the lab model, and what they leave in their folders."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_unsafe_routes.study.campaign import VOLATILE_TYPES, read_records
from vllm_unsafe_routes.study.jobs import VOLATILE

# float32 scores of one candidate differ by some 1e-6 with what else is in the batch; records are rounded to 1e-3.
LOGPROB_TOLERANCE = 2e-3
COMMAND = (sys.executable, "-m", "vllm_unsafe_routes.cli")


def lab_fsour(out: Path, **options: Any) -> list[str]:
    """Arguments of a small F-SOUR campaign; options as `min_gain=0.1`."""
    settings: dict[str, Any] = dict(
        model="lab",
        data="lab:search",
        limit=6,
        dtype="float32",
        draws=3,
        attempts=2,
        min_gain=1e-3,
        max_new_tokens=8,
        concurrency=3,
    )
    settings |= {"out": out, **options}
    return ["fsour", *(part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value)))]


def start(arguments: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The command as a process in a session of its own; its messages are appended to `log`."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*COMMAND, *arguments], stdout=stream, stderr=stream, env={**os.environ, **environment}, start_new_session=True
        )


def num_lines(folder: Path) -> int:
    """Whole records in a folder."""
    path = folder / "records.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(process: subprocess.Popen[bytes], ready: Callable[[], bool], seconds: float = 900) -> bool:
    """Wait until something holds; False if the process ended first."""
    deadline = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "nothing happened for too long"
        time.sleep(0.002)
    return True


def results(folder: Path) -> dict[Any, Any]:
    """Records by key, without what may differ between runs; a key that is there twice fails."""
    found: dict[Any, Any] = {}
    for record in read_records(folder):
        assert record["key"] not in found, f"{record['key']} is there twice"
        if record.get("type") in VOLATILE_TYPES:
            continue
        found[record["key"]] = _without_volatile(record)
    return found


def assert_same_results(one: Mapping[Any, Any], other: Mapping[Any, Any]) -> None:
    """Equal keys and values; only log-probabilities may differ a little."""
    assert sorted(one, key=repr) == sorted(other, key=repr)
    for key, record in one.items():
        _assert_close(record, other[key], repr(key))


def _without_volatile(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_volatile(item) for name, item in value.items() if name not in VOLATILE}
    return [_without_volatile(item) for item in value] if isinstance(value, list) else value


def _assert_close(one: Any, other: Any, where: str) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one:
            _assert_close(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for at, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_close(a, b, f"{where}[{at}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert math.isclose(one, other, rel_tol=0, abs_tol=LOGPROB_TOLERANCE), f"{where}: {one} and {other}"
    else:
        assert one == other, f"{where}: {one!r} and {other!r}"
