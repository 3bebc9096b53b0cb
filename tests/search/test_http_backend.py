"""Two real vLLM servers as replicas: the scores and results of an engine in this process, also when one of them dies."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from campaign_runs import assert_same_results, lab_fsour, num_lines, results
from engines import engine

from vllm_unsafe_routes import RouteError, RoutePlan, RoutePolicy, lab
from vllm_unsafe_routes.cli import main
from vllm_unsafe_routes.search.http import HttpBackend
from vllm_unsafe_routes.search.scorer import RouteScorer, make_backend
from vllm_unsafe_routes.study import workspace
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts

pytestmark = pytest.mark.v1_only
MODEL = str(lab.model_path())


class Replica:
    """A server process on the lab model, in a session of its own."""

    def __init__(self, log):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log, self.url = log, f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--enforce-eager", "--dtype", "float32", "--block-size", "32"]
        command += ["--enable-route-overrides"]
        env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=env, cwd=log.parent, start_new_session=True
            )

    def wait(self):
        deadline = time.monotonic() + 600
        while True:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-5000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            time.sleep(0.5)

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    started = [Replica(folder / f"{name}.txt") for name in ("one", "two")]
    try:
        for replica in started:
            replica.wait()
        yield started
    finally:
        for replica in started:
            replica.kill()


@pytest.fixture(scope="module")
def prompts():
    model = Model("lab")
    return [model.item(record).prompt for record in read_prompts("lab:search", 3)]


@pytest.fixture(scope="module")
def plans(prompts):
    rng = random.Random(3)
    return [None] + [
        RoutePlan().force(rng.randrange(4), [rng.randrange(len(prompts[0].token_ids))], rng.sample(range(16), 4)) for _ in range(40)
    ]


@pytest.fixture(scope="module")
def from_engine(prompts, plans, tmp_path_factory):
    """Scores, and the results of a campaign, of an engine in this process."""
    folder = tmp_path_factory.mktemp("engine") / "run"
    with (
        engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm,
        pytest.MonkeyPatch.context() as patch,
    ):
        scorer = RouteScorer(llm)
        scores = [scorer.score(prompt.token_ids, prompt.target, plans).tolist() for prompt in prompts]
        patch.setattr(workspace, "open_backend", lambda *_, **__: contextlib.nullcontext(make_backend(llm)))
        assert main(lab_fsour(folder)) == 0
    return scores, results(folder)


def test_scores_equal_the_engine(from_engine, replicas, prompts, plans):
    scorer = RouteScorer([replica.url for replica in replicas], model=MODEL)
    for prompt, expected in zip(prompts, from_engine[0], strict=True):
        assert scorer.score(prompt.token_ids, prompt.target, plans).tolist() == pytest.approx(expected, abs=1e-4)
    assert scorer.stats.requests == 3 * len(plans)
    with pytest.raises(RouteError, match="layer 9 has no experts"):
        scorer.score(prompts[0].token_ids, prompts[0].target, [RoutePlan().disable(9, "all", [1])])
    with pytest.raises(RouteError, match="do not fit the context of 256"):
        scorer.score([5] * 256, prompts[0].target, [None])
    scorer.backend.close()


def test_a_server_with_another_policy_is_refused(replicas, prompts):
    policy = RoutePolicy.from_json({"version": "route-policy/1", "layers": {"1": {"disabled": [3]}}})
    backend = HttpBackend([replicas[0].url], MODEL, policy)
    with pytest.raises(RouteError, match=f"the server enforces policy None, the search was told {policy.digest}"):
        RouteScorer(backend).score(prompts[0].token_ids, prompts[0].target, [None])
    backend.close()


def test_a_server_that_is_not_there_is_named(replicas, capsys, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert main([*lab_fsour(tmp_path / "run"), "--server", replicas[0].url, "--server", nobody]) == 1
    assert f"unsafe-routes: server {nobody} cannot be used: ConnectError" in capsys.readouterr().err


def test_one_server_dies_and_the_campaign_ends_on_the_other(from_engine, replicas, tmp_path, capsys):
    folder = tmp_path / "run"

    def kill_one():
        while num_lines(folder) < 10:
            time.sleep(0.002)
        replicas[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    status = main([*lab_fsour(folder), *(part for replica in replicas for part in ("--server", replica.url))])
    lines = num_lines(folder)
    killer.join()
    assert status == 0, capsys.readouterr().err
    assert replicas[0].process.poll() is not None and lines > 30
    assert_same_results(from_engine[1], results(folder))


def test_when_no_server_is_left_nothing_is_lost(from_engine, replicas, tmp_path, capsys):
    folder = tmp_path / "run"

    def kill_the_other():
        while num_lines(folder) < 12:
            time.sleep(0.002)
        replicas[1].kill()

    killer = threading.Thread(target=kill_the_other)
    killer.start()
    status = main([*lab_fsour(folder), "--server", replicas[1].url])
    killer.join()
    said = capsys.readouterr().err
    assert status == 1 and f"unsafe-routes: the request failed on 4 tries, last: {replicas[1].url}: " in said
    found = results(folder)
    assert len(found) >= 10
    assert_same_results({key: from_engine[1][key] for key in found}, found)
