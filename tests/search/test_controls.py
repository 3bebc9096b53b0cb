"""What is route and what is rescaling: the controls are what transformers says of the same plans."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from engines import engine
from oracle import Oracle

from vllm_unsafe_routes import RoutePlan, lab
from vllm_unsafe_routes.commands import show
from vllm_unsafe_routes.report import collect, load_runs
from vllm_unsafe_routes.search.attempt import Attempt, Route
from vllm_unsafe_routes.search.backend import run_search
from vllm_unsafe_routes.search.fsour import FsourSettings
from vllm_unsafe_routes.search.masking import MaskSettings, mask_attack
from vllm_unsafe_routes.search.masks import Experts, mask_plan, rng_of
from vllm_unsafe_routes.search.rosais import Prompt, RosaisSettings
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.study.controls import Found, controls_record
from vllm_unsafe_routes.study.records import Controls, Fsour, read
from vllm_unsafe_routes.study.run import run_fsour, run_masks, run_rosais
from vllm_unsafe_routes.study.settings import FsourStudy, JudgeSettings, MaskStudy, RosaisStudy

PROMPT, TARGET = (5, 9, 17, 33, 60, 21), (7, 8, 40)


@pytest.mark.parametrize(("family", "renormalizes"), [("olmoe", False), ("qwen3_moe", True)])
def test_controls_are_what_transformers_says(family, renormalizes, tiny_model):
    oracle = Oracle(tiny_model(family))

    def says(plan):
        rows = oracle.logprobs([*PROMPT, *TARGET[:-1]], len(PROMPT), plan)[len(PROMPT) - 1 :]
        return rows[range(len(TARGET)), list(TARGET)].double().sum().item()

    with engine(tiny_model(family), {"allow_overrides": True}) as llm:
        backend = make_backend(llm)
        layers, top_k = backend.shape.moe_layers, backend.shape.top_k
        cells = [(layers[0], 1), (layers[0], 3), (layers[1], 3)]
        attempt = Attempt(routes=[Route(layer, at, tuple(range(at, at + top_k)), 0.1) for layer, at in cells])
        found = Fsour(
            **dict(attack="fsour-paper", prompt="q", prompt_tokens=len(PROMPT), category="", seed=3, attempts=1, candidates=1),
            **dict(needed=1, tokens=1, computed_tokens=1, success=None, score=None),
            final=attempt.state(),
        )
        item = SimpleNamespace(prompt=Prompt("q", PROMPT, TARGET), record=SimpleNamespace(category=""))
        record = run_search(backend, controls_record(backend, item, Found.by_fsour(found, item, "masked"), 2))
        experts = Experts(backend.shape, None)
    says(None)
    routes = {layer: [ids for ids, _ in oracle.routes[layer]] for layer in layers}
    everywhere, own, randoms = RoutePlan(), RoutePlan(), []
    for layer in layers:
        for at in range(len(PROMPT)):
            everywhere.force(layer, [at], routes[layer][at])
    for layer, at in cells:
        own.force(layer, [at], routes[layer][at])
    for number in range(2):
        rng, plan = rng_of("controls", 3, "q", number), RoutePlan()
        for layer, at in cells:
            plan.force(layer, [at], experts.draw(rng, layer))
        randoms.append(says(plan))
    expected = [says(plan) for plan in (None, attempt.plan(), attempt.plan("native"), own, everywhere)]
    measured = [record.clean, record.found, record.native, record.own, record.own_everywhere]
    assert measured == pytest.approx(expected, abs=3e-4)
    assert record.randoms == pytest.approx(randoms, abs=3e-4)
    assert record.cells == 3 and record.value("random") == pytest.approx(sum(randoms) / 2, abs=3e-4)
    if renormalizes:  # there is nothing to rescale
        assert [record.own, record.own_everywhere] == pytest.approx([record.clean] * 2, abs=3e-4)
        assert record.native == pytest.approx(record.found, abs=3e-4)
    else:
        assert abs(record.own_everywhere - record.clean) > 1e-3


@pytest.mark.parametrize("weights", ["masked", "native"])
def test_controls_of_masks_are_what_transformers_says(weights, tiny_model):
    """The search takes the masks that transformers finds best under the same weights, and the controls are those of all tokens."""
    oracle = Oracle(tiny_model("olmoe"))
    read_tokens, rows = [*PROMPT, *TARGET[:-1]], slice(len(PROMPT) - 1, None)

    def says(plan):
        found = oracle.logprobs(read_tokens, len(PROMPT), plan)[rows]
        return found[range(len(TARGET)), list(TARGET)].double().sum().item()

    settings = MaskSettings(num_layers=2, num_masks=6, seed=3, score="target", weights=weights)
    item = SimpleNamespace(prompt=Prompt("q", PROMPT, TARGET), record=SimpleNamespace(category=""))
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        backend = make_backend(llm)
        layers = backend.shape.moe_layers[:2]
        result = run_search(backend, mask_attack(backend, [item.prompt], (), layers, settings))
        found = Found.by_masks("rosais", 3, result.masks, item, weights)
        record = run_search(backend, controls_record(backend, item, found, 2))
        experts = Experts(backend.shape, None)
    chosen = []
    for layer in layers:
        tried = experts.draw_many(6, layer, "search-mask", 3, "q")
        values = [says(mask_plan([*chosen, (layer, mask)], "all", weights)) for mask in tried]
        chosen.append((layer, tried[values.index(max(values))]))
    assert list(result.masks) == chosen
    assert result.masked * len(TARGET) == pytest.approx(max(values), abs=3e-4)
    says(None)
    routes = {layer: [ids for ids, _ in oracle.routes[layer]] for layer in backend.shape.moe_layers}
    own, everywhere, randoms = RoutePlan(), RoutePlan(), []
    for layer, rows_of_layer in routes.items():
        for at, ids in enumerate(rows_of_layer):
            everywhere.force(layer, [at], ids)
            if layer in layers:
                own.force(layer, [at], ids)
    for number in range(2):
        rng = rng_of("controls", 3, "q", number)
        randoms.append(says(mask_plan([(layer, experts.draw(rng, layer)) for layer in layers], "all")))
    plans = (None, result.plan(settings), mask_plan(chosen, "all", "native"), own, everywhere)
    measured = [record.clean, record.found, record.native, record.own, record.own_everywhere]
    assert measured == pytest.approx([says(plan) for plan in plans], abs=3e-4)
    assert record.randoms == pytest.approx(randoms, abs=3e-4)
    assert (record.weights, record.cells) == (weights, 2)
    assert (record.found == record.native) == (weights == "native")


def test_a_run_of_masks_with_controls(tmp_path):
    shared = {"model": "lab", "data": "lab:search", "limit": 2, "judging": JudgeSettings(max_new_tokens=2)}
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        backend = make_backend(llm)
        run_rosais(RosaisStudy(**shared, out=tmp_path / "rosais", search=RosaisSettings(num_masks=2)), backend)
        masks = MaskStudy(
            **shared,
            out=tmp_path / "masks",
            rosais=tmp_path / "rosais",
            levels=(1, 2),
            attacks=("rosais", "random-masks"),
            search=MaskSettings(num_masks=3, weights="native"),
            controls=2,
        )
        summary = run_masks(masks, backend)
        assert run_masks(masks, backend) == summary
        shared_masks = replace(masks, out=tmp_path / "shared", attacks=("rosais",), chosen_on="lab:tune", chosen_limit=2)
        assert run_masks(shared_masks, backend)["controls"]["rosais-dataset"]["prompts"] == 2
    records = list(read(masks.out, Controls))
    assert [(one.attack, one.cells, one.weights) for one in records] == [
        (attack, 2, "native") for attack in masks.attacks for _ in range(2)
    ]
    assert list(summary["controls"]) == list(masks.attacks)
    assert show.masks(summary).count("target, own_everywhere") == 2
    shown = collect(load_runs([masks.out]))["controls"]
    assert [(one["attack"], one["prompts"]) for one in shown] == [("RoSais masking", 2), ("random masks", 2)]


def test_a_run_with_controls(tmp_path):
    study = FsourStudy(
        model="lab",
        data="lab:search",
        out=tmp_path,
        limit=2,
        search=FsourSettings(num_draws=2, num_attempts=1, weights="native"),
        judging=JudgeSettings(max_new_tokens=2),
        controls=3,
    )
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        backend = make_backend(llm)
        summary = run_fsour(study, backend)
        assert run_fsour(study, backend) == summary
    records = list(read(tmp_path, Controls))
    searched = [record for record in read(tmp_path, Fsour) if record.final.routes]
    assert len(records) == len(searched) == summary["controls"]["prompts"] > 0
    for record, search in zip(records, searched, strict=True):
        assert (record.weights, len(record.randoms)) == ("native", 3)
        assert record.found == record.native == pytest.approx(search.final.best, abs=2e-3)
        assert record.clean == pytest.approx(search.final.clean, abs=2e-3)
    assert "target, own_everywhere" in show.fsour(summary, "paper")
    (shown,) = collect(load_runs([tmp_path]))["controls"]
    assert shown["prompts"] == len(records) and shown["weights"] == "native"
