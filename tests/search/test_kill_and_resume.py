"""Campaigns that are killed at random moments and resumed end with the results of an uninterrupted run."""

import os
import random
import signal
import time

import psutil
import pytest
from campaign_runs import assert_same_results, lab_fsour, num_lines, results, start, wait_for

pytestmark = [pytest.mark.v1_only, pytest.mark.timeout(3000)]  # processes of their own

OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Results of one run from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "log.txt"
    assert start(lab_fsour(folder / "run"), log).wait(900) == 0, log.read_text()
    found = results(folder / "run")
    kinds = {record["type"] for record in found.values()}
    assert kinds == {"answer", "step", "attempt", "fsour"} and len(found) > 60
    return found


def engine_core(process):
    """vLLM's engine process of a driver."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(child for child in children if "EngineCore" in " ".join(child.cmdline()) + child.name())


def kill(process):
    """SIGKILL to driver and engine alike."""
    os.killpg(process.pid, signal.SIGKILL)


def disturb(how, folder, log, rng):
    """Start the campaign, let it write a random number of records, disturb it; returns the exit status and what it said."""
    enough = num_lines(folder) + rng.randint(1, 12)
    said = log.stat().st_size if log.exists() else 0
    process = start(lab_fsour(folder), log, **(OWN_PROCESS if how.endswith("own process") else {}))
    try:
        alive = wait_for(process, lambda: num_lines(folder) >= enough)
        time.sleep(rng.uniform(0, 0.05))
        if alive and how.startswith("kill"):
            kill(process)
        elif alive and how.startswith("engine killed"):
            engine_core(process).kill()
        elif alive and how.startswith("Ctrl-C"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: every process of the group gets it
        status = process.wait(300)
    finally:
        if process.poll() is None:
            kill(process)
    return alive, status, log.read_text(errors="replace")[said:]


def go_through(disturbances, folder, rng):
    """Disturb a campaign in every way, then let it end; rows written before must stand there to the last."""
    log = folder / "log.txt"
    run = folder / "run"
    hits = 0
    for how in disturbances:
        old = results(run)
        alive, status, said = disturb(how, run, log, rng)
        hits += alive
        if alive and how.startswith("Ctrl-C"):
            assert status == 130, said
            assert "stopping; what is finished is kept" in said
            assert "the same command goes on from" in said
            # vLLM's own processes have messages of their own when they are interrupted.
            assert how.endswith("own process") or "Traceback" not in said.rpartition("stopping;")[2]
        elif alive and how.startswith("engine killed"):
            assert status == 1, said
            assert "unsafe-routes: the engine's process has ended" in said
        elif alive:
            assert status == -signal.SIGKILL
        new = results(run)
        assert old.items() <= new.items()
        if not alive:
            assert status == 0, said
    assert start(lab_fsour(run), log).wait(900) == 0, log.read_text()
    assert (run / "summary.json").exists()
    return hits


def test_disturbed_in_every_way_it_ends_with_the_same_results(uninterrupted, tmp_path):
    ways = ["kill", "Ctrl-C", "engine killed, own process", "kill", "kill"]
    assert go_through(ways, tmp_path, random.Random(5)) >= 4
    assert_same_results(uninterrupted, results(tmp_path / "run"))


@pytest.mark.long
def test_killed_fifteen_times_it_ends_with_the_same_results(uninterrupted, tmp_path):
    rng = random.Random(6)
    ways = [rng.choice(["kill", "kill", "kill", "kill, own process", "Ctrl-C, own process"]) for _ in range(15)]
    assert go_through(ways, tmp_path, rng) >= 8
    assert_same_results(uninterrupted, results(tmp_path / "run"))
