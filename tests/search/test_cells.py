"""A search over cells draws and accepts what the same search over requests does, step by step."""

import random
from collections import defaultdict

import numpy as np
import pytest
from engines import SETTINGS, engine, random_prompt
from fsour_reference import REFUSED
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import lab
from vllm_unsafe_routes.search.attempt import Attempt
from vllm_unsafe_routes.search.backend import Stats, run_search, run_tasks
from vllm_unsafe_routes.search.fsour import STRATEGIES, FsourSettings, fsour_attempt
from vllm_unsafe_routes.search.masking import MaskSettings, mask_attack
from vllm_unsafe_routes.search.rosais import LATER_LAYERS, Prompt, RosaisSettings, rosais
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.study.model import Model
from vllm_unsafe_routes.study.prompts import read_prompts

# Nats that a score may differ by from one way to the other.
TOLERANCE = 1e-5


def searched(backend, prompts, settings):
    stats = Stats()
    tasks = [(prompt.id, fsour_attempt(backend, prompt, settings, 0, lambda *_: REFUSED)) for prompt in prompts]
    return dict(run_tasks(backend, tasks, stats=stats)), stats


@pytest.fixture
def steps(monkeypatch):
    """Of each attempt, by its id(): the best score before each batch of candidates, and the scores of the batch."""
    seen, kept, own = defaultdict(list), [], Attempt.count

    def count(self, scores):
        kept.append(self)  # so that no other attempt gets its id()
        seen[id(self)].append((self.best, np.array(scores.values)))
        own(self, scores)

    monkeypatch.setattr(Attempt, "count", count)
    return seen


def parted_by_rounding(mine, others, min_gain):
    """Whether two searches part; then a decision before must have hung on less than what scores may differ by."""
    for at, ((_, values), (_, other)) in enumerate(zip(mine, others, strict=False)):
        if len(values) == len(other) and abs(values - other).max() < TOLERANCE:
            continue
        best, before = mine[at - 1]
        first, *others_of_them = sorted(before, reverse=True)
        margins = [*abs(before - best - min_gain), *(first - second for second in others_of_them[:1])]
        assert min(margins) < TOLERANCE, (at, best, before)
        return True
    return False


def check_both_ways(backend, prompts, settings, steps):
    backend.has_cells = True
    cells, cell_stats = searched(backend, prompts, settings)
    assert backend.has_cells
    backend.has_cells = False
    requests, stats = searched(backend, prompts, settings)
    parted = {key for key in cells if parted_by_rounding(steps[id(cells[key])], steps[id(requests[key])], settings.min_gain)}
    assert len(parted) < len(cells)
    for key in cells.keys() - parted:
        one, other = cells[key], requests[key]
        assert [(r.layer, r.position, r.experts) for r in one.routes] == [(r.layer, r.position, r.experts) for r in other.routes]
        assert [r.gain for r in one.routes] == pytest.approx([r.gain for r in other.routes], abs=TOLERANCE)
        assert (one.answer, one.candidates, one.needed, one.tokens) == (
            other.answer,
            other.candidates,
            other.needed,
            other.tokens,
        )
    assert any(one.routes for one in cells.values())
    assert parted or (cell_stats.requests, cell_stats.tokens) == (stats.requests, stats.tokens)
    assert cell_stats.computed_tokens < 0.6 * stats.tokens


@pytest.fixture(scope="module")
def lab_backend():
    with engine(lab.model_path(), {"allow_overrides": True}, enable_prefix_caching=True) as llm:
        yield make_backend(llm)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lab_model(lab_backend, strategy, steps):
    model = Model("lab")
    prompts = [model.item(record).prompt for record in read_prompts("lab:search", 3)]
    check_both_ways(lab_backend, prompts, FsourSettings(strategy=strategy, num_draws=4, max_new_tokens=2), steps)


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
    assert values == pytest.approx(expected, abs=TOLERANCE) and masks == other
    assert len({round(value, 4) for value in values}) > 12


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_random_models(tiny_model, family, steps):
    rng = random.Random(2)
    prompts = [
        Prompt(f"p{at}", tuple(random_prompt(rng, 8 + at, VOCAB_SIZE)), tuple(random_prompt(rng, 5, VOCAB_SIZE))) for at in range(2)
    ]
    with engine(tiny_model(family), {"allow_overrides": True}, **SETTINGS.get(family, {})) as llm:
        backend = make_backend(llm)
        for strategy in STRATEGIES:
            settings = FsourSettings(strategy=strategy, num_draws=3, max_new_tokens=2)
            check_both_ways(backend, prompts, settings, steps)
