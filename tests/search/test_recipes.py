"""Recipes that choose whole plans, against plain transformers twins of the same rules: same rankings, choices and scores."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
from engines import engine
from oracle import Oracle

from vllm_unsafe_routes import LayerPolicy, ModelShape, RoutePlan, RoutePolicy
from vllm_unsafe_routes.errors import RouteError
from vllm_unsafe_routes.search.backend import run_search
from vllm_unsafe_routes.search.candidates import can_silence, under_policy
from vllm_unsafe_routes.search.mascing import MascingSettings, log_ratio, mascing
from vllm_unsafe_routes.search.masks import rng_of
from vllm_unsafe_routes.search.rosais import Prompt
from vllm_unsafe_routes.search.safex import SafexSettings, safex, silenced, silencing_policy, stable_experts
from vllm_unsafe_routes.search.scorer import make_backend
from vllm_unsafe_routes.search.silencing import SilencingSettings, silence
from vllm_unsafe_routes.search.steering import steering_plan, steermoe
from vllm_unsafe_routes.search.usage import Usage, usage

PROMPTS = (Prompt("one", (5, 9, 17, 33, 60, 21), (7, 8, 40)), Prompt("two", (70, 3, 44), (12, 99)))
RNG = random.Random(4)
FIRST, SECOND = ([[RNG.randrange(*ids) for _ in range(RNG.randrange(5, 20))] for _ in range(6)] for ids in ((3, 60), (70, 128)))


class Twin:
    """transformers and loops; what a plan means is the oracle's."""

    def __init__(self, folder):
        self.oracle = Oracle(folder)

    def says(self, plan):
        """Mean over the prompts of the target's log-probability."""
        values = []
        for prompt in PROMPTS:
            rows = self.oracle.logprobs([*prompt.token_ids, *prompt.target[:-1]], len(prompt.token_ids), plan)
            values.append(sum(rows[len(prompt.token_ids) - 1 + at, token].item() for at, token in enumerate(prompt.target)))
        return sum(values) / len(values)

    def counts(self, prompt):
        """(layer, expert) -> tokens of the prompt."""
        self.oracle.logprobs(prompt, len(prompt), None)
        found = {}
        for layer, routes in self.oracle.routes.items():
            for ids, _ in routes:
                for expert in ids:
                    found[layer, expert] = found.get((layer, expert), 0) + 1
        return found

    def share(self, counts, prompts, at):
        return sum(one.get(at, 0) for one in counts) / sum(map(len, prompts))

    def stability(self, places, settings):
        """(layer, expert) -> share of the draws in which it was among the largest differences, and the mean difference."""
        kinds = [(prompts, [self.counts(prompt) for prompt in prompts]) for prompts in (FIRST, SECOND)]
        times, sums = dict.fromkeys(places, 0), dict.fromkeys(places, 0.0)
        for number in range(settings.num_resamples):
            rng = rng_of("safex", settings.seed, number)
            drawn = []
            for prompts, counts in kinds:
                chosen = rng.integers(len(prompts), size=len(prompts))
                drawn.append(([counts[at] for at in chosen], [prompts[at] for at in chosen]))
            gaps = {at: self.share(*drawn[0], at) - self.share(*drawn[1], at) for at in places}
            for at in sorted(places, key=lambda at: (-gaps[at], at))[: settings.num_selected]:
                times[at] += gaps[at] > 0
            for at in places:
                sums[at] += gaps[at]
        return {at: (times[at] / settings.num_resamples, sums[at] / settings.num_resamples) for at in places}

    def silence(self, shape, settings):
        """Greedy: the expert whose absence serves best, then the best of those that did well before."""
        limit = max(1, int(settings.max_share * shape.num_experts))
        taken, best, asked = [], self.says(None), 1
        order = [(layer, expert) for layer in shape.moe_layers for expert in range(shape.num_experts)]
        while True:
            room = [at for at in order if at not in taken and [layer for layer, _ in taken].count(at[0]) < limit]
            tried = room[: settings.num_candidates - asked][: settings.num_ranked if taken else None]
            values = {}
            for at in tried:
                plan = RoutePlan()
                for layer, expert in [*taken, at]:
                    plan.disable(layer, "all", [expert])
                values[at] = self.says(plan)
            asked += len(tried)
            order = sorted(tried, key=lambda at: -values[at]) + [at for at in room if at not in tried]
            if not tried or values[order[0]] <= best + settings.min_gain:
                return taken, best, asked
            taken, best = [*taken, order[0]], values[order[0]]

    def bias(self, shape, settings):
        """One strength for all layers on a grid, again around the best, then each layer's own."""
        first, second = ([self.counts(prompt) for prompt in prompts] for prompts in (FIRST, SECOND))

        def ratio(at):
            parts = [
                (sum(one.get(at, 0) for one in counts) + 0.5) / (sum(map(len, prompts)) + 1)
                for counts, prompts in ((first, FIRST), (second, SECOND))
            ]
            return math.log(parts[0] / parts[1])

        def plan_of(alphas):
            plan = RoutePlan(settings.weights)
            for layer, alpha in alphas.items():
                if alpha:
                    plan.bias(layer, "all", {expert: -alpha * ratio((layer, expert)) for expert in range(shape.num_experts)})
            return plan

        alphas, best, asked = dict.fromkeys(shape.moe_layers, 0.0), self.says(None), 1
        rounds = [(None, settings.max_alpha / settings.num_tries**number) for number in range(settings.num_rounds)]
        rounds += [(layer, settings.max_alpha / 2**number) for number in range(1, 9) for layer in shape.moe_layers]
        for layer, step in rounds:
            centre = alphas[shape.moe_layers[0] if layer is None else layer]
            low = centre - step if layer is not None else max(0, centre - step)
            grid = [low + (centre + step - low) * at / settings.num_tries for at in range(settings.num_tries + 1)]
            values = {}
            for alpha in [one for one in grid if abs(one - centre) > 1e-12][: settings.num_candidates - asked]:
                tried = dict.fromkeys(alphas, alpha) if layer is None else {**alphas, layer: alpha}
                values[alpha] = (self.says(plan_of(tried)), tried)
            asked += len(values)
            found = max(values.values(), key=lambda one: one[0], default=(-math.inf, None))
            if found[0] > best + settings.min_gain:
                best, alphas = found
        return alphas, best, asked


@pytest.fixture(scope="module")
def olmoe(tiny_model):
    folder = tiny_model("olmoe")
    with engine(folder, {"allow_overrides": True}) as llm:
        yield SimpleNamespace(backend=make_backend(llm), twin=Twin(folder))


@pytest.fixture(scope="module")
def both(olmoe):
    """Usage of both kinds of prompts."""
    return tuple(run_search(olmoe.backend, usage(olmoe.backend, prompts)) for prompts in (FIRST, SECOND))


def test_safex_is_what_the_twin_does(olmoe, both):
    backend, twin, shape = olmoe.backend, olmoe.twin, olmoe.backend.shape
    settings = SafexSettings(num_resamples=25, num_selected=4, seed=3)
    found = stable_experts(shape, *both, settings)
    places = [(layer, expert) for layer in shape.moe_layers for expert in range(shape.num_experts)]
    expected = twin.stability(places, settings)
    for layer, expert in places:
        slot = shape.slot_of_layer[layer]
        measured = (found.stability[slot, expert], found.difference[slot, expert])
        assert measured == pytest.approx(expected[layer, expert], abs=1e-9)
    ranking = sorted((at for at in places if expected[at][0]), key=lambda at: (-expected[at][0], -round(expected[at][1], 12), at))
    assert list(found.ranking) == ranking
    assert len({stability for stability, _ in expected.values()}) > 2  # the draws disagree
    chosen = run_search(backend, safex(backend, PROMPTS, found.ranking))
    masks = []
    for count in range(1, len(ranking) + 1):
        plan, taken = RoutePlan(), {}
        for layer, expert in ranking:
            if sum(map(len, taken.values())) < count and len(taken.setdefault(layer, [])) < shape.num_experts - shape.top_k:
                taken[layer].append(expert)
        for layer, experts in taken.items():
            plan.disable(layer, "all", experts)
        masks.append(twin.says(plan))
    masks = masks[: chosen.candidates - 1]
    assert [chosen.clean, chosen.value] == pytest.approx([twin.says(None), max(twin.says(None), *masks)], abs=1e-4)
    assert twin.says(chosen.plan) == pytest.approx(chosen.value, abs=1e-4)


@pytest.mark.parametrize("num_ranked", [None, 3])
def test_silencing_is_what_the_twin_does(num_ranked, olmoe):
    settings = SilencingSettings(max_share=0.3, num_candidates=60, num_ranked=num_ranked)
    chosen = run_search(olmoe.backend, silence(olmoe.backend, PROMPTS, settings))
    taken, best, asked = olmoe.twin.silence(olmoe.backend.shape, settings)
    assert (list(chosen.experts), chosen.candidates) == (taken, asked)
    assert len(taken) > 1 and asked <= 60
    assert chosen.value == pytest.approx(best, abs=1e-4)
    assert chosen.value > chosen.clean


def test_silencing_stops_at_tau(olmoe):
    settings = SilencingSettings(tau=1e-9)
    assert run_search(olmoe.backend, silence(olmoe.backend, PROMPTS[1:], settings)).candidates == 1


def test_mascing_is_what_the_twin_does(olmoe, both):
    settings = MascingSettings(max_alpha=3.0, num_tries=4, num_candidates=24)
    chosen = run_search(olmoe.backend, mascing(olmoe.backend, PROMPTS, log_ratio(*both), settings))
    alphas, best, asked = olmoe.twin.bias(olmoe.backend.shape, settings)
    assert chosen.alphas == pytest.approx(list(alphas.values()))
    assert (chosen.candidates, asked) == (24, 24)
    assert len(set(chosen.alphas)) > 1 and chosen.value > chosen.clean
    assert chosen.value == pytest.approx(best, abs=1e-4)


def test_steering_chooses_its_numbers(olmoe, both):
    difference = both[0].shares() - both[1].shares()
    chosen = run_search(olmoe.backend, steermoe(olmoe.backend, PROMPTS, difference, 16))
    assert chosen.candidates <= 16 and chosen.value > chosen.clean
    assert olmoe.twin.says(chosen.plan) == pytest.approx(chosen.value, abs=1e-4)
    # Four numbers of each kind: none, all, and two in between.
    numbers = [[round(part * (sign * difference > 0).sum() / 3) for part in range(4)] for sign in (1, -1)]
    plans = [steering_plan(olmoe.backend.shape, difference, *pair) for pair in itertools.product(*numbers) if any(pair)]
    assert chosen.value == pytest.approx(max(map(olmoe.twin.says, plans)), abs=1e-4)


SHAPE = ModelShape("olmoe", 2, 64, (0, 1), num_experts=6, top_k=2)
POLICY = RoutePolicy({0: LayerPolicy(frozenset({0, 1}), frozenset({2}))})
BACKEND = SimpleNamespace(shape=SHAPE, policy=POLICY)


def test_a_policy_s_experts_are_left_alone():
    assert can_silence(BACKEND) == {0: ([3, 4, 5], 2), 1: ([0, 1, 2, 3, 4, 5], 4)}
    assert can_silence(BACKEND, 1) == {0: ([3, 4, 5], 1), 1: ([0, 1, 2, 3, 4, 5], 1)}
    ranking = [(0, expert) for expert in range(6)] + [(1, expert) for expert in range(6)]
    assert silenced(BACKEND, ranking, 5) == [(0, 3), (0, 4), (1, 0), (1, 1), (1, 2)]
    assert under_policy(BACKEND, np.ones((2, 6))).tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]


def test_silenced_experts_as_a_policy():
    policy = silencing_policy(SHAPE, [(1, 4), (0, 2), (1, 0)])
    policy.validate(SHAPE)
    assert {layer: entry.disabled for layer, entry in policy.layers.items()} == {1: {0, 4}, 0: {2}}


def test_usage_of_some_prompts():
    counts = np.array([[[4, 0], [2, 2]], [[0, 6], [3, 3]]])
    found = Usage(counts, np.array([4, 6]))
    assert found.shares().tolist() == [[0.4, 0.6], [0.5, 0.5]]
    assert found.shares(np.array([1, 1])).tolist() == [[0, 1], [0.5, 0.5]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SafexSettings(num_resamples=0), "num_resamples must be at least 1, got 0"),
        (lambda: SilencingSettings(max_share=1.5), r"max_share must be in \(0, 1\], got 1.5"),
        (lambda: SilencingSettings(tau=0), "tau must be in"),
        (lambda: SilencingSettings(num_candidates=1), "num_candidates must be at least 2, got 1"),
        (lambda: SilencingSettings(num_ranked=0), "num_ranked must be at least 1, got 0"),
        (lambda: MascingSettings(max_alpha=0), "max_alpha must be above 0, got 0"),
        (lambda: MascingSettings(num_tries=1), "num_tries must be at least 2, got 1"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(RouteError, match=message):
        make()
