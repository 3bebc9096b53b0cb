"""F-SOUR in the engine accepts, step by step, what a plain transformers implementation of the paper accepts."""

import pytest
from engines import engine
from fsour_reference import REFUSED, check_same
from oracle import Oracle

from vllm_unsafe_routes import RouteError, lab
from vllm_unsafe_routes.search.backend import run_search, run_tasks
from vllm_unsafe_routes.search.fsour import FsourSettings, fsour_attempt
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts


def attempt(backend, prompt, settings, **options):
    return run_search(backend, fsour_attempt(backend, prompt, settings, 0, lambda *_: REFUSED, **options))


@pytest.fixture(scope="module")
def lab_backend():
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        yield make_backend(llm)


@pytest.fixture(scope="module")
def lab_prompts():
    model = Model("lab")
    return [model.item(record).prompt for record in read_prompts("lab:search", 3)]


@pytest.mark.parametrize("strategy", ["paper", "code"])
def test_accepts_what_transformers_accepts_on_the_lab_model(lab_backend, lab_prompts, strategy):
    settings = FsourSettings(strategy=strategy, num_draws=4, max_new_tokens=2)
    check_same(lab_backend, Oracle(lab.model_path()), lab_prompts[: 3 if strategy == "paper" else 1], settings)


def test_the_batch_size_changes_nothing_but_the_work(lab_backend, lab_prompts):
    one, all_at_once = (
        attempt(lab_backend, lab_prompts[0], FsourSettings(num_draws=5, batch=batch, max_new_tokens=2)) for batch in (1, None)
    )
    assert one.routes and [route.experts for route in one.routes] == [route.experts for route in all_at_once.routes]
    assert one.candidates == one.needed + 1 == all_at_once.needed + 1 < all_at_once.candidates


def test_a_cut_off_attempt_goes_on_to_the_same_end(lab_backend, lab_prompts):
    settings = FsourSettings(num_draws=4, max_new_tokens=2)
    prompt = lab_prompts[1]
    notes = []
    tasks = [(0, fsour_attempt(lab_backend, prompt, settings, 0, lambda *_: REFUSED))]
    ((_, whole),) = run_tasks(lab_backend, tasks, note=lambda _, value: notes.append(value))
    assert len(notes) > 3
    for note in (notes[0], notes[len(notes) // 2]):
        resumed = attempt(lab_backend, prompt, settings, resume=note)
        assert [(r.layer, r.position, r.experts) for r in resumed.routes] == [
            (r.layer, r.position, r.experts) for r in whole.routes
        ]
        assert resumed.best == pytest.approx(whole.best, abs=1e-4)
        assert resumed.needed == whole.needed


def test_settings_are_checked():
    for values, message in [
        ({"strategy": "magic"}, "strategy 'magic' is not one of paper, code, adaptive"),
        ({"tau": 0.0}, "tau must be in"),
        ({"num_draws": 0}, "num_draws must be at least 1"),
    ]:
        with pytest.raises(RouteError, match=message):
            FsourSettings(**values)
