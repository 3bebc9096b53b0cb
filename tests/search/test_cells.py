"""A search over cells draws and accepts what the same search over requests does, step by step."""

import random

import pytest
from engines import SETTINGS, engine, random_prompt
from fsour_reference import REFUSED
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import lab
from vllm_unsafe_routes.search.backend import Stats, run_search, run_tasks
from vllm_unsafe_routes.search.fsour import STRATEGIES, FsourSettings, fsour_attempt
from vllm_unsafe_routes.search.masking import MaskSettings, mask_attack
from vllm_unsafe_routes.search.rosais import LATER_LAYERS, Prompt, RosaisSettings, rosais
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts


def searched(backend, prompts, settings):
    stats = Stats()
    tasks = [(prompt.id, fsour_attempt(backend, prompt, settings, 0, lambda *_: REFUSED)) for prompt in prompts]
    return dict(run_tasks(backend, tasks, stats=stats)), stats


def check_both_ways(backend, prompts, settings):
    backend.has_cells = True
    cells, cell_stats = searched(backend, prompts, settings)
    assert backend.has_cells
    backend.has_cells = False
    requests, stats = searched(backend, prompts, settings)
    for key, one in cells.items():
        other = requests[key]
        assert [(r.layer, r.position, r.experts) for r in one.routes] == [(r.layer, r.position, r.experts) for r in other.routes]
        assert [r.gain for r in one.routes] == pytest.approx([r.gain for r in other.routes], abs=1e-5)
        assert (one.answer, one.candidates, one.needed, one.tokens) == (
            other.answer,
            other.candidates,
            other.needed,
            other.tokens,
        )
    assert any(one.routes for one in cells.values())
    assert (cell_stats.requests, cell_stats.tokens) == (stats.requests, stats.tokens)
    assert cell_stats.computed_tokens < 0.6 * stats.tokens


@pytest.fixture(scope="module")
def lab_backend():
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        yield make_backend(llm)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lab_model(lab_backend, strategy):
    model = Model("lab")
    prompts = [model.item(record).prompt for record in read_prompts("lab:search", 3)]
    check_both_ways(lab_backend, prompts, FsourSettings(strategy=strategy, num_draws=4, max_new_tokens=2))


@pytest.mark.parametrize("score", ["next", "target"])
def test_masks_on_the_lab_model(lab_backend, score):
    """RoSais and router masking: the same masks with the same gains."""
    model = Model("lab")
    prompts = [model.item(record).prompt for record in read_prompts("lab:search", 2)]
    words = list(range(8, 14))

    def found():
        results = [
            run_search(lab_backend, rosais(lab_backend, prompts[0], words, RosaisSettings(4, score=score, later_layers=later)))
            for later in LATER_LAYERS
        ]
        masked = run_search(lab_backend, mask_attack(lab_backend, prompts, words, [1, 2, 0], MaskSettings(3, 5, score=score)))
        gains = [gain for result in results for layer in sorted(result.gains) for gain in result.gains[layer]]
        return [*gains, results[0].clean, masked.clean, masked.masked], [result.masks for result in results], masked.masks

    lab_backend.has_cells = True
    values, *masks = found()
    assert lab_backend.has_cells
    lab_backend.has_cells = False
    expected, *other = found()
    assert values == pytest.approx(expected, abs=1e-5) and masks == other
    assert len({round(value, 4) for value in values}) > 12


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_random_models(tiny_model, family):
    rng = random.Random(2)
    prompts = [
        Prompt(f"p{at}", tuple(random_prompt(rng, 8 + at, VOCAB_SIZE)), tuple(random_prompt(rng, 5, VOCAB_SIZE))) for at in range(2)
    ]
    with engine(tiny_model(family), {"allow_overrides": True}, **SETTINGS.get(family, {})) as llm:
        backend = make_backend(llm)
        for strategy in STRATEGIES:
            settings = FsourSettings(strategy=strategy, num_draws=3, max_new_tokens=2)
            check_both_ways(backend, prompts, settings)
