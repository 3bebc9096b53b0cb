"""Campaigns on a real local Ray cluster: nodes that are killed in the middle cost nothing."""

from __future__ import annotations

import os
import signal
import sys
from types import SimpleNamespace

import pytest
from campaign_runs import assert_same_results, lab_fsour, num_lines, results, start, wait_for

from vllm_unsafe_routes.errors import RouteError
from vllm_unsafe_routes.study import cluster
from vllm_unsafe_routes.study.settings import EngineSettings

pytestmark = [pytest.mark.v1_only, pytest.mark.timeout(3000)]  # processes of their own


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    opened = cluster.ray_engines("", lambda: None, size=1, most=1)
    with pytest.raises(RouteError, match=r"needs the 'ray' library; install vllm-unsafe-routes\[ray\]"):
        opened.__enter__()


def test_servers_and_a_cluster_exclude_each_other():
    with pytest.raises(RouteError, match="exclude each other"):
        EngineSettings(servers=("http://127.0.0.1:1",), ray="")


def test_jobs_have_their_share_and_go_elsewhere_with_their_notes():
    """What the driver does with what its actors tell, without a cluster."""
    calls = {}
    actors = [
        SimpleNamespace(
            start=SimpleNamespace(remote=lambda number=number: ("start", number)),
            work=SimpleNamespace(remote=lambda jobs, number=number: calls.setdefault(number, []).append(jobs) or ("work", number)),
        )
        for number in range(2)
    ]
    engines = cluster.RayEngines(actors)
    one, other = engines._engines
    one.state, one.call = "ready", None
    waiting = cluster.deque(cluster.RemoteJob((number,), lambda notes: iter(())) for number in range(6))
    engines._hand_out(waiting, 64)
    assert len(one.jobs) == 3 and len(waiting) == 3  # the one that starts late finds its share
    one.jobs[(0,)].notes.append("noted")
    engines._lose(one, waiting)
    assert [job.key for job in waiting] == [(number,) for number in range(6)] and one.call == ("start", 0)
    other.state, other.call = "ready", None
    engines._hand_out(waiting, 64)
    assert len(other.jobs) == 6 and calls[1][0][0].notes == ["noted"]
    other.jobs[(0,)].losses = 2
    with pytest.raises(RouteError, match=r"3 Ray actors ended, one after another, while they ran \(0,\)"):
        engines._lose(other, waiting)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of a run on one engine."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "log.txt"
    assert start(lab_fsour(folder / "run"), log).wait(900) == 0, log.read_text()
    return results(folder / "run")


@pytest.fixture
def two_nodes():
    """A cluster of two nodes with a core each: (cluster, the node without the head)."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster_of_two = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        second = cluster_of_two.add_node(num_cpus=1)
        cluster_of_two.wait_for_nodes()
        yield cluster_of_two, second
    finally:
        cluster_of_two.shutdown()


@pytest.mark.long
def test_a_node_killed_in_the_middle_loses_nothing(whole, two_nodes, tmp_path):
    both, second = two_nodes
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = start([*lab_fsour(run), "--ray", both.address], log)
    assert wait_for(process, lambda: len(log.read_text().split("is ready")) == 3 and num_lines(run) >= 12), log.read_text()
    before = results(run)
    both.remove_node(second, allow_graceful=False)
    assert process.wait(900) == 0, log.read_text()
    said = log.read_text()
    print(*(line for line in said.splitlines() if "Ray actor" in line), sep="\n")
    assert "is lost; its" in said
    assert before.items() <= results(run).items()
    assert_same_results(whole, results(run))


@pytest.mark.long
def test_ctrl_c_stops_cleanly_and_one_engine_goes_on(whole, two_nodes, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = start([*lab_fsour(run), "--ray", two_nodes[0].address], log)
    assert wait_for(process, lambda: num_lines(run) >= 9), log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    before = results(run)
    assert start(lab_fsour(run), log).wait(900) == 0, log.read_text()
    assert before.items() <= results(run).items()
    assert_same_results(whole, results(run))
