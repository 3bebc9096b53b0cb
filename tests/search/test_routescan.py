"""RouteScan's recipe against a plain transformers twin, on the lab model: the same counts, the same scores."""

import json

import numpy as np
import pytest
from engines import engine
from oracle import Oracle

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.commands.routescan import fit
from vllm_unsafe_routes.evaluation.statistics import auroc
from vllm_unsafe_routes.lab import model_path
from vllm_unsafe_routes.route_probe import RouteProbe
from vllm_unsafe_routes.search.backend import run_search
from vllm_unsafe_routes.search.routescan import ProbeSettings, expert_load, fit_probe, logistic_regression
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts


def twin_score(oracle, document, prompt):
    """The probe file's formula with loops over a transformers model, and the counts."""
    oracle.logprobs(prompt, len(prompt), None)
    counts = np.zeros((len(document["layers"]), len(document["weights"][0])), int)
    score = document["bias"]
    for slot, layer in enumerate(document["layers"]):
        for ids, _ in oracle.routes[layer]:
            for expert in ids:
                counts[slot, expert] += 1
                score += document["weights"][slot][expert] / len(prompt)
    return score, counts


def test_counts_and_scores_equal_transformers(tmp_path):
    model, oracle = Model("lab"), Oracle(model_path())
    kinds = [
        [list(model.encode_chat(record.request)) for record in read_prompts(source, 16)]
        for source in ("lab:search", "lab:search:benign")
    ]
    with engine(model_path(), {"allow_overrides": True}) as llm:
        backend = make_backend(llm)
        probe = fit(backend, kinds[0], kinds[1], ProbeSettings(folds=4))
        loads = [run_search(backend, expert_load(backend, prompts[:6])) for prompts in kinds]
    probe.save(tmp_path / "probe.json")
    document = json.loads((tmp_path / "probe.json").read_text())
    again = RouteProbe.load(tmp_path / "probe.json")
    again.validate(model.shape)
    scores = []
    for prompts, load in zip(kinds, loads, strict=True):
        for prompt, shares in zip(prompts, load, strict=False):
            score, counts = twin_score(oracle, document, prompt)
            assert shares * len(prompt) == pytest.approx(counts)
            assert again.score(counts, len(prompt)) == pytest.approx(score, abs=1e-9)
            scores.append(score)
    assert min(scores[:6]) > max(scores[6:])
    value, low, high = document["measured"]["auroc"]
    assert low <= value <= high and value > 0.9 and low < 1


def test_the_fit_is_an_optimum():
    """Each part of the gradient of what is minimised is zero, also where there are more features than prompts."""
    rng = np.random.default_rng(3)
    for count, width in ((40, 6), (30, 200)):
        features = rng.normal(size=(count, width)) * rng.uniform(0.1, 3, width)
        features[:, 0] = 0.25  # a constant feature says nothing
        labels = (features[:, 1] + rng.normal(size=count) > 0).astype(float)
        weights, bias = logistic_regression(features, labels, 0.01)
        share = 1 / (1 + np.exp(-(features @ weights + bias)))
        slope = (features - features.mean(0)).T @ (share - labels) / count + 0.01 * width * weights * features.var(0)
        assert np.abs(slope).max() < 1e-7 and abs((share - labels).sum()) < 1e-7
        assert weights[0] == 0


def test_auroc_and_its_interval():
    rng = np.random.default_rng(1)
    first, second = rng.normal(1, 1, 60), rng.normal(0, 1, 50)
    pairs = [(a > b) + 0.5 * (a == b) for a in first for b in second]
    found = auroc(first, second)
    assert found.value == pytest.approx(np.mean(pairs)) and found.low < found.value < found.high
    assert auroc(second, first).value == pytest.approx(1 - found.value)
    apart = auroc(np.arange(5.0) + 9, np.arange(7.0))
    assert (apart.value, apart.high) == (1, 1) and 0.4 < apart.low < 0.6  # five prompts of a kind do not show 1
    assert auroc(np.zeros(4), np.zeros(4)).value == 0.5
    with pytest.raises(RouteError, match="both kinds"):
        auroc(np.zeros(0), np.zeros(3))


PROBE = {"version": "route-probe/1", "model": "x", "layers": [0, 1], "weights": [[1.0, 2], [3, 4]], "bias": 0.5, "threshold": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "route-probe/9"}, "probe version 'route-probe/9' is not 'route-probe/1'"),
        ({"speed": 1}, "probe has unknown keys speed"),
        ({"weights": [[1.0, 2], [3]]}, "weights must be a list of lists of equal length"),
        ({"weights": [[1.0, float("nan")], [3, 4]]}, "weights has nan, which is no finite number"),
        ({"layers": [0]}, "layers must be integers, as many as weights has rows"),
        ({"threshold": "high"}, "threshold has high, which is no finite number"),
        ({"bias": None}, "bias has None"),
    ],
)
def test_a_bad_probe_file_says_what_is_wrong(change, message, tmp_path):
    path = tmp_path / "probe.json"
    path.write_text(json.dumps({**PROBE, **change}))
    with pytest.raises(RouteError, match=message):
        RouteProbe.load(path)


def test_a_probe_is_for_its_model(tmp_path):
    probe = RouteProbe.from_json(PROBE)
    probe.save(tmp_path / "probe.json")
    assert RouteProbe.load(tmp_path / "probe.json").digest == probe.digest
    with pytest.raises(RouteError, match="the probe is for model x, this is "):
        probe.validate(Model("lab").shape)
    with pytest.raises(RouteError, match="cannot be read"):
        RouteProbe.load(tmp_path / "none.json")


def test_too_few_prompts_for_the_folds():
    loads = np.random.default_rng(2).random((4, 4, 16))
    with pytest.raises(RouteError, match="4 prompts of a kind are too few for 5 folds"):
        fit_probe(Model("lab").shape, loads, loads, ProbeSettings())
