"""F-SOUR as Inspect's solver finds what `unsafe-routes fsour` finds on the same server: routes, scores, candidates and answers."""

from __future__ import annotations

import importlib.util
import json

import pytest
from campaign_runs import LOGPROB_TOLERANCE
from inspect_runs import POLICY, PROMPTS, inspect_eval, lab_server, receipts, write_files

from vllm_unsafe_routes.cli import main
from vllm_unsafe_routes.search.attempt import Attempt
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.records import Fsour, read

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="needs requirements/inspect.txt"),
]

SETTINGS = {"strategy": "paper", "num_draws": 3, "num_attempts": 2, "min_gain": 1e-3, "max_new_tokens": 32}


@pytest.mark.parametrize("enforced", [None, POLICY], ids=["no policy", "policy"])
def test_solver_and_campaign_find_the_same(enforced, tmp_path):
    data, path = write_files(tmp_path)["advbench"], tmp_path / "policy.json"
    path.write_text(json.dumps(enforced))
    campaign = ["fsour", "--model", "lab", "--data", str(data), "--judge", "lab", "--out", str(tmp_path / "run")]
    campaign += ["--strategy", "paper", "--draws", "3", "--attempts", "2", "--min-gain", "1e-3", "--max-new-tokens", "32"]
    solver = [
        "-T",
        f"data={data}",
        "-T",
        "judge=lab",
        "--solver",
        "vllm_unsafe_routes/fsour",
        "-S",
        "folder=lab",
        "-S",
        "judge=lab",
    ]
    solver += [part for name, value in SETTINGS.items() for part in ("-S", f"{name}={value}")]
    under = [] if enforced is None else ["--route-policy", str(path)]
    with lab_server(tmp_path, "--enable-route-overrides", *under) as started:
        assert main([*campaign, "--server", started.url, *(["--policy", str(path)] if under else [])]) == 0
        more = ["-M", f"policy={path}"] if under else []
        log = inspect_eval(tmp_path, started.url, "vllm_unsafe_routes/advbench", *solver, *more)
    assert log.status == "success" and len(log.samples) == len(PROMPTS)
    records = {record.prompt: record for record in read(tmp_path / "run", Fsour)}
    model = Model("lab")
    for sample, receipt in zip(log.samples, receipts(log), strict=True):
        record, found = records[str(sample.id)], sample.metadata["fsour"]
        assert sample.scores["answered"].value == float(record.success) == float(found["success"])
        assert (found["candidates"], found["attempts"]) == (record.candidates, record.attempts)
        assert found["gain"] == pytest.approx(record.final.best - record.final.clean, abs=LOGPROB_TOLERANCE)
        prompt = model.encode_chat(PROMPTS[int(sample.id)].text)
        plan = Attempt.from_state(record.final).plan().for_prompt(prompt)
        assert found["plan"] == (plan.digest if record.final.routes else None) == (receipt or {}).get("plan")
    assert any(record.final.routes for record in records.values())
