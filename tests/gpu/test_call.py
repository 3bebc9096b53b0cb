"""The calls on a GPU, rehearsed on CPU: every step but the GPU itself, and what becomes of parts that hang or fail."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from common import Child, ChildFailed, lay_out, rounds
from gpu_call import CALLS, Call, Part
from shapes import NAMES, Ceilings, Forward, config_of, differing_operations, floors_of, sizes_of

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
SMALL = (
    Part(400, "routes_exact.py", "--jobs 2 --only kernels,replays"),
    Part(500, "kernel_speed.py", "--only OLMoE"),
)


def rehearse(out: Path, call: str, *options: str, timeout: float) -> tuple[subprocess.CompletedProcess[str], dict[str, list[dict]]]:
    """A rehearsal of a call; "small" is one of this test's own. Returns question -> rows of what came back."""
    code = f"import sys\nsys.path.append({str(BENCHMARKS)!r})\nimport gpu_call\nfrom gpu_call import Part\n"
    code += f"gpu_call.CALLS['small'] = {SMALL!r}\nsys.argv = ['gpu_call.py', *{[call, '--rehearse', *options]!r}]\n"
    code += "sys.exit(gpu_call.main())"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, timeout=timeout)
    assert [path.name for path in out.iterdir()] == [f"call-{call}.tgz"], done.stdout[-3000:] + done.stderr[-3000:]
    rows = {}
    with tarfile.open(out / f"call-{call}.tgz") as packed:
        for member in packed.getmembers():
            if member.name.endswith(".jsonl"):
                rows[Path(member.name).stem] = [json.loads(line) for line in packed.extractfile(member)]
    return done, rows


def test_a_small_call(tmp_path):
    """Checks in two processes at once, with an engine and the project laid out by path; one shape of the kernel benchmark."""
    done, rows = rehearse(tmp_path, "small", timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert {row["check"]: row["result"] for row in rows["routes_exact"]} == {"kernels": "pass", "replays": "pass"}
    assert next(row for row in rows["routes_exact"] if row["check"] == "replays")["routes_checked"] > 100
    assert {row["us_median"] for row in rows["kernel_speed"]} == {"not measured"}
    assert all(row["rehearsal"] is True for question in ("routes_exact", "kernel_speed") for row in rows[question])
    assert [row["step"] for row in rows["steps"] if row["question"] == "call"][-1] == "ends"
    assert "every figure below means nothing" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("call", ["1", "2", "eager"])
def test_a_whole_call(tmp_path, call):
    """Every part of it; a busy machine with two cores gets four times the seconds."""
    done, rows = rehearse(tmp_path, call, "--slower", "4", timeout=3600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert {part.script.removesuffix(".py") for part in CALLS[call]} | {"steps"} == set(rows)
    assert all(row.get("result", "pass") == "pass" for row in rows.get("routes_exact", ()))


def test_the_calls_fit_their_time_and_one_line():
    for call, seconds in (("1", 345), ("2", 390), ("eager", 300), ("again", 320)):
        until = [part.until for part in CALLS[call]]
        assert until == sorted(until)
        assert until[-1] <= seconds
        assert all((BENCHMARKS / part.script).exists() for part in CALLS[call])


def test_a_part_that_hangs_is_ended_with_its_children(tmp_path, monkeypatch):
    marker = tmp_path / "alive"
    script = tmp_path / "benchmarks/hangs.py"
    script.parent.mkdir()
    late = f"import time; time.sleep(5); open({str(marker)!r}, 'w')"
    script.write_text(f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {late!r}])\ntime.sleep(60)\n")
    monkeypatch.setattr("gpu_call.ROOT", tmp_path)
    monkeypatch.setattr("gpu_call.GRACE", 0.0)
    call = Call("1", True, tmp_path / "scratch", tmp_path / "out")
    assert not call.run(Part(call.seconds + 2.5, "hangs.py", ""))
    assert not call.run(Part(call.seconds + 1, "hangs.py", "")), "no time is left for it"
    steps = [json.loads(line)["step"] for line in (call.results / "steps.jsonl").read_text().splitlines()]
    assert steps == ["part begins", "part cut off", "part not run: no time left"]
    time.sleep(4)
    assert not marker.exists()
    call.copy_out()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["call-1.tgz"]


def test_the_project_is_laid_out_by_path(tmp_path):
    site = lay_out(ROOT, tmp_path / "project")
    code = """
import vllm_unsafe_routes.kernels
from importlib.metadata import distribution
(point,) = [item for item in distribution("vllm-unsafe-routes").entry_points if item.group == "vllm.general_plugins"]
print(vllm_unsafe_routes.kernels.__file__, point.value, sep="\\n")
"""
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, env=env)
    file, value = done.stdout.split()
    assert Path(file).is_relative_to(site)
    assert value == "vllm_unsafe_routes.engine.plugin:register"


def test_another_archive_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with tarfile.open(tmp_path / "other.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "file", "site/file")
    call = Call("1", True, tmp_path / "scratch", tmp_path / "out")
    with pytest.raises(SystemExit, match="was not made by pack_engine"):
        call.install(str(tmp_path / "other.tar.xz"))


def test_a_child_that_fails_says_why(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(
        f"""
import sys
sys.path.append({str(BENCHMARKS)!r})
from common import serve_child
def echo(options):
    command = yield "ready"
    while True:
        if command["value"] == 3:
            raise ValueError("three is too many")
        command = yield command["value"] + options["add"]
serve_child({{"echo": echo}})
"""
    )
    child = Child(script, "echo", {"add": 10}, tmp_path / "log", {})
    assert [child.read(60), child.ask(60, value=1), child.ask(60, value=2)] == ["ready", 11, 12]
    with pytest.raises(ChildFailed, match="echo: ValueError: three is too many"):
        child.ask(60, value=3)
    child.close()


def test_rounds_end_before_the_deadline(monkeypatch):
    now = 0.0
    monkeypatch.setattr("common.time.monotonic", lambda: now)
    done = []
    for number in rounds(99, 10.0):
        done.append(number)
        now += 3.0
    assert done == [0, 1, 2]
    assert list(rounds(2, 1e9)) == [0, 1]


def test_parameters_are_those_published():
    """Parameters in all and a step's floor, from the same formulas as docs/gpu.md."""
    billions = {key: round(sizes_of(config_of(key)).total / 1e9, 1) for key in NAMES}
    assert billions == {"olmoe": 6.9, "qwen2_moe": 14.3, "deepseek_v2_lite": 15.7, "mixtral": 46.7}
    floors = floors_of(sizes_of(config_of("olmoe")), Forward(1, 1, 100, 100), Ceilings(4e12, 8e14))
    # One token of OLMoE reads its 1.3e9 active parameters less the embedding, and 100 tokens' keys: 2.4e9 bytes.
    active = 16 * (4 * 2048**2 + 8 * 3 * 2048 * 1024 + 64 * 2048) + 50304 * 2048
    assert sum(floors.values()) == pytest.approx((2 * active + 101 * 16 * 4096 * 2) / 4e12, rel=1e-3)
    # Two tokens through two layers: experts of one token at the first, K and V of what follows at the second, there one scored row.
    kv, routed, head = 4096 * 2048, 8 * 3 * 2048 * 1024, 50304 * 2048
    scored = 4 * 2048**2 + 64 * 2048 + routed - kv + head + 2 * 4096
    cells = [routed + 2 * kv + scored, routed + kv + scored, routed + head]
    assert differing_operations(sizes_of(config_of("olmoe", num_layers=2)), 2, 1) == pytest.approx(2 * sum(cells) / 3)
