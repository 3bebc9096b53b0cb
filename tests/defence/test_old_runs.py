"""Derivations and matrices that commit 3c3c03c finished: opened again from Python they end the same, without an engine's help."""

import contextlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_unsafe_routes import RouteError, RoutePolicy
from vllm_unsafe_routes.defence.attacks import AttackSettings
from vllm_unsafe_routes.defence.derive import DeriveStudy, GreedyTrials, derive
from vllm_unsafe_routes.defence.matrix import Defence, MatrixStudy, evaluate
from vllm_unsafe_routes.defence.trials import Budget
from vllm_unsafe_routes.defence.utility import UtilityPrompts
from vllm_unsafe_routes.lab.language import REMINDER
from vllm_unsafe_routes.search.adaptive import AdaptiveSettings
from vllm_unsafe_routes.search.backend import Response
from vllm_unsafe_routes.search.fsour import FsourSettings
from vllm_unsafe_routes.search.masking import MaskSettings
from vllm_unsafe_routes.search.suffix import SuffixSettings
from vllm_unsafe_routes.study import workspace
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.settings import EngineSettings, JudgeSettings

FOLDERS = Path(__file__).parents[1] / "study" / "folders"
SHARED = {"model": "lab", "engine": EngineSettings(dtype="float32"), "judging": JudgeSettings(max_new_tokens=32)}


class Idle:
    """An engine that scores, which a greedy path does once before it sees that it has ended, and does nothing else."""

    policy = None
    max_model_len = 4096
    capacity = 16

    def __init__(self) -> None:
        self.shape = Model("lab").shape
        self._waiting: list[tuple[int, Response | RouteError]] = []

    def submit(self, number, request):
        assert request.extras.score is not None and not request.extras.has_plan, "a finished run wants more than it needs"
        scores = np.zeros(request.extras.score.token_ids.shape, np.float32)
        self._waiting.append((number, Response((), 0, scores)))

    def score_cells(self, items):
        return None

    def poll(self):
        found, self._waiting = self._waiting, []
        return found


@pytest.fixture
def folders(tmp_path, monkeypatch):
    shutil.copytree(FOLDERS, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(folder):
    return (folder / "records.jsonl").read_text().splitlines()


def without_date(path):
    document = json.loads(path.read_text())
    document["provenance"].pop("date", None)
    return document


def derivation(**changes):
    study = DeriveStudy(
        **SHARED,
        data="lab:tune",
        limit=3,
        out=Path("policy"),
        runs=(Path("rosais"), Path("fsour-adaptive")),
        utility=UtilityPrompts(("lab:tune:benign",), ("lab:tune:category",), 5),
        rules=("greedy", "protect"),
        protections=(1,),
        budget=Budget(0.9, 0.5),
        suffixes=1,
        greedy=GreedyTrials((1, 2)),
        keep=1,
        fsour=FsourSettings(num_attempts=1, adaptive=AdaptiveSettings(max_candidates=60)),
    )
    return replace(study, **changes)


def test_a_derivation_goes_on(folders):
    said = []
    found = derive(derivation(), Idle(), said.append)
    assert (found.best.name, len(said)) == ("protect/1", 1 + 6)
    assert found.policy == RoutePolicy.load("policy/policy.json")
    assert lines_of(folders / "policy") == lines_of(FOLDERS / "policy")
    for name in ("policy.json", "control-0.json", "control-1.json", "control-2.json"):
        assert without_date(folders / "policy" / name) == without_date(FOLDERS / "policy" / name), name
    assert json.loads(Path("policy/summary.json").read_text()) == json.loads((FOLDERS / "policy" / "summary.json").read_text())


def test_a_matrix_goes_on(folders, monkeypatch):
    monkeypatch.setattr(workspace, "open_backend", lambda *_, **__: contextlib.nullcontext(Idle()))
    study = MatrixStudy(
        **SHARED,
        data="lab:test",
        limit=2,
        out=Path("matrix"),
        seeds=(0, 1),
        attacks=("none", "random-masks", "rosais", "fsour", "fsour-adaptive", "suffix", "suffix-transfer"),
        defences=(Defence(), Defence.parse("policy:policy/policy.json+reminder", REMINDER)),
        rosais=Path("rosais"),
        search=AttackSettings(
            masks=MaskSettings(2, 8),
            fsour=FsourSettings(num_draws=2, num_attempts=1, adaptive=AdaptiveSettings(max_candidates=40)),
            suffix=SuffixSettings(num_rounds=1),
            answered_first=False,
        ),
        library_prompts=1,
        utility=UtilityPrompts(("lab:test:benign",), ("lab:test:category",), 4),
    )
    summary = evaluate(study)
    assert json.loads(json.dumps(summary)) == json.loads((FOLDERS / "matrix" / "summary.json").read_text())
    assert lines_of(folders / "matrix") == lines_of(FOLDERS / "matrix")
    assert Path("matrix/matrix.csv").read_bytes() == (FOLDERS / "matrix" / "matrix.csv").read_bytes()


MATRIX = {**SHARED, "data": "lab:test", "out": Path("matrix")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: derivation(rules=("luck",)), "rule 'luck' is not one of protect, dataset-route"),
        (lambda: derivation(engine=EngineSettings(policy=RoutePolicy({}))), "a policy is derived on an engine without one"),
        (lambda: derive(derivation(utility=UtilityPrompts()), Idle()), "a utility budget needs benign prompts"),
        (lambda: derive(derivation(budget=Budget(0.98, confidence=0.8)), Idle()), "5 benign prompts, all right, show a share of"),
        (lambda: derive(derivation(runs=(Path("matrix"), Path("nowhere"))), Idle()), "nowhere"),
        (lambda: GreedyTrials(harmless=0), "harmless must be at least 1, got 0"),
        (lambda: MatrixStudy(**MATRIX, attacks=("luck",)), "attack 'luck' is not one of none, random-masks"),
        (lambda: MatrixStudy(**MATRIX, attacks=("suffix-transfer",)), "suffix-transfer needs the attack suffix"),
        (lambda: MatrixStudy(**MATRIX, attacks=("suffix-transfer", "suffix")), "suffix-transfer needs the attack suffix before it"),
        (lambda: MatrixStudy(**MATRIX, attacks=("file",)), "the attack file needs --attack-file"),
        (lambda: MatrixStudy(**MATRIX, attacks=("rosais",)), "the masking attacks need --rosais"),
        (lambda: MatrixStudy(**{**MATRIX, "engine": EngineSettings(servers=("http://x",))}), "it cannot run on servers"),
        (lambda: evaluate(MatrixStudy(**MATRIX, attacks=("rosais",), rosais=Path("policy"))), "is a run of derive-policy, not of"),
        (lambda: evaluate(MatrixStudy(**MATRIX, defences=(Defence(jitter=0.5),)), Idle()), "needs an engine of its own"),
        (lambda: Defence(jitter=-1.0), "jitter scale must be a number above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_an_engine_starts(folders, make, message):
    with pytest.raises(RouteError, match=message):
        make()
