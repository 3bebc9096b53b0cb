"""The kernel benchmark rehearsed on CPU: checks, rows and table; nothing that looks like a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benchmarks"


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def beside(code: str) -> str:
    """Run code beside the benchmark's modules, in a process of its own so that their names stay out of this one."""
    return run("-c", f"import sys\nsys.path.append({str(BENCH)!r})\n{code}")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of a rehearsal of all gatings."""
    out = tmp_path_factory.mktemp("rehearsal")
    assert "no_time_for=nothing" in run(str(BENCH / "kernel_speed.py"), "--rehearse", "--out", str(out))
    return [json.loads(line) for line in (out / "kernel_speed.jsonl").read_text().splitlines()]


def test_a_rehearsal_checks_everything_and_times_nothing(rows):
    assert {row["us_median"] for row in rows} == {row["times_the_floor"] for row in rows} == {"not measured"}
    of_shape = {}
    for row in rows:
        of_shape.setdefault(row["shape"], set()).add(row["variant"])
    assert len(of_shape) == 8
    ours = {"ours, no table", "ours, no directed token", "ours, all masked", "ours, all forced", "ours behind native, routes kept"}
    for variants in of_shape.values():
        assert ours | {"torch eager"} <= variants
    notes = {row["variant"]: row["note"] for row in rows}
    for peer in ("vllm topk_softmax", "vllm topk_sigmoid", "vllm grouped_topk"):
        assert notes[peer].startswith("peer not available: ")
    assert all(not note for variant, note in notes.items() if variant.startswith("ours"))


def test_the_figures_of_made_up_times(rows, tmp_path):
    """The sums are right before a GPU sees this code."""
    code = f"""
import json
import kernel_speed
floors = kernel_speed.Floors(copy_gb_s=2000.0, launch_us=2.0)
rows = {[row for row in rows if row["shape"] == "OLMoE 64/8"]!r}
for row in rows:
    if not row["note"]:
        row |= kernel_speed.figures([4.0, 3.0, 5.0], 3 * (64 * 2 + 8 * 8), floors)
print(json.dumps([rows[0], kernel_speed.figures([40.0, 40.0], 40_000_000, floors), kernel_speed.table(rows)]))
"""
    row, large, table = json.loads(beside(code))
    assert (row["us_median"], row["us_iqr"]) == (4.0, 2.0)
    assert row["gb_s"] == pytest.approx(3 * (64 * 2 + 8 * 8) / 4.0 / 1e3, abs=1e-3)
    assert (row["floor_us"], row["times_the_floor"]) == (2.0, 2.0)
    assert (large["floor_us"], large["times_the_floor"]) == (20.0, 2.0)
    assert "| OLMoE 64/8 | 1 | 2.0 | 4.0 | 4.0 | 4.0 | 4.0 |" in table
    assert "copy 2000.0 GB/s, empty kernel 2.0 µs" in table


def test_a_wrong_contestant_stops_the_run():
    beside(
        """
from kernel_peers import CONTESTANTS, SHAPES, check, make_problem
problem = make_problem(SHAPES[1], 4, 1, "cpu")
for contestant in CONTESTANTS[:4]:
    call = contestant.prepare(problem)
    check(problem, contestant, call)
    for spoil in (lambda w, i: (w + 1e-4, i), lambda w, i: (w, i.flip(-1)), lambda w, i: (w, i + 64)):
        try:
            check(problem, contestant, lambda slot: spoil(*call(slot)))
        except AssertionError:
            continue
        raise SystemExit(contestant.name + " passed with wrong results")
"""
    )
