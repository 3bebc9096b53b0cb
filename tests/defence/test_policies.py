"""Rules that turn searches into policies, on records with known answers; no engine."""

import numpy as np
import pytest

from vllm_unsafe_routes import ModelShape, RouteError
from vllm_unsafe_routes.defence import policies as rules
from vllm_unsafe_routes.defence.trials import Budget
from vllm_unsafe_routes.search.attempt import AttemptState, Route
from vllm_unsafe_routes.study.records import Fsour, Rosais

SHAPE = ModelShape("toy", 3, 8, (0, 2), 6, 2)


def rosais_record(prompt, masks, gains):
    return Rosais(
        prompt=prompt,
        category="",
        seed=0,
        clean=-1.0,
        scores=dict.fromkeys(SHAPE.moe_layers, 0.0),
        masks={layer: tuple(map(tuple, masks)) for layer in SHAPE.moe_layers},
        gains={layer: tuple(gains) if layer == 2 else (0.0,) * len(gains) for layer in SHAPE.moe_layers},
    )


def planted_records(culprit, carrier):
    """At layer 2 a mask gains 1 with the culprit in it, and 3 more without the carrier."""
    rng = np.random.default_rng(0)
    masks = [sorted(rng.choice(6, 2, replace=False).tolist()) for _ in range(60)]
    gains = [1.0 * (culprit in mask) + 3.0 * (carrier not in mask) for mask in masks]
    return [rosais_record(f"p{at}", masks, [gain + at for gain in gains]) for at in range(3)]


def test_effect_finds_who_opens_and_who_carries():
    effects = rules.presence_effect(planted_records(culprit=4, carrier=1), SHAPE)
    bans, protections = rules.ranked(effects), rules.ranked(effects, -1.0)
    assert rules.take(bans, 1, [2]) == {2: [4]}
    assert rules.take(protections, 1, [2]) == {2: [1]}
    # A prompt that gains from every mask alike says nothing about experts.
    assert effects[0] == pytest.approx(np.zeros(6), abs=1e-12)


def test_effect_of_an_expert_in_every_mask_is_unknown():
    effects = rules.presence_effect([rosais_record("p", [[0, 1], [0, 2]], [1.0, 2.0])], SHAPE)
    assert np.isnan(effects[2][[0, 3, 4, 5]]).all()
    assert [choice.expert for choice in rules.ranked(effects) if choice.layer == 2] == [2, 1]


def test_lift_counts_routes_of_successful_attempts_only():
    def fsour(success, routes):
        counts = dict.fromkeys(("candidates", "needed", "tokens", "computed_tokens"), 0)
        final = AttemptState(clean=-2.0, best=-1.0, routes=tuple(routes), trace=(), **counts)
        named = {"attack": "fsour-paper", "prompt": "p", "prompt_tokens": 2, "category": "", "seed": 0, "attempts": 1}
        return Fsour(success=success, score=float(success), final=final, **named, **counts)

    records = [fsour(True, [Route(2, 0, (3, 4), 1.0), Route(2, 1, (3, 5), 1.0)]), fsour(False, [Route(2, 0, (0, 1), 1.0)])]
    found = rules.accepted_frequency(records, SHAPE)
    assert found[2].tolist() == [0, 0, 0, 1.0, 0.5, 0.5]
    assert 0 not in found
    own = rules.route_frequency([np.array([[[0, 1], [3, 4]], [[0, 2], [3, 5]]], np.int32)], SHAPE)
    assert own[0].tolist() == [1.0, 0.5, 0.5, 0, 0, 0]
    assert own[2].sum() == SHAPE.top_k


def test_dataset_route_is_the_best_shared_mask():
    masks = [[0, 1], [2, 3]]
    records = [rosais_record("p", masks, [3.0, 2.0]), rosais_record("q", masks, [0.0, 2.0])]
    assert rules.take(rules.dataset_route(records), 2, [2]) == {2: [2, 3]}
    records.append(rosais_record("r", [[0, 1], [4, 5]], [1.0, 1.0]))
    with pytest.raises(RouteError, match="--same-masks"):
        rules.dataset_route(records)


def test_a_combined_policy_is_valid_and_names_its_model():
    policy = rules.combine(SHAPE, {2: [0, 1, 2, 3, 4, 5]}, {2: [1, 5], 0: [3]}, {"rule": "x"})
    assert policy.layers[2].disabled == {0, 1, 2, 3}
    assert policy.layers[2].protected == {5}
    assert policy.layers[0].protected == {3}
    assert policy.model == SHAPE.fingerprint


def test_additions_in_turn():
    steps = [(2, 1, 1.5), (2, 1, 1.5), (2, 3, -1.0), (2, 3, 0.0), (0, 4, 2.0), (0, 4, -2.0), (0, 5, 0.5)]
    bans, biases = rules.additions(rules.Choice(layer, expert, 0.0, step) for layer, expert, step in steps)
    assert (bans, biases) == ({2: [3]}, {2: {1: 3.0}, 0: {5: 0.5}})
    policy = rules.combine(SHAPE, bans, {0: [5]}, {}, biases)
    assert policy.layers[2].bias == {1: 3.0} and policy.layers[0].protected == {5}
    for number in range(5):
        control = rules.random_control(policy, SHAPE, number, "x")
        assert [len(entry.disabled) for entry in control.layers.values()] == [0, 1]
        assert [[*entry.bias.values()] for entry in control.layers.values()] == [[0.5], [3.0]]


def test_random_choices_depend_on_their_parts():
    one, again, other = (rules.random_choices(SHAPE, [0, 2], "ban", at) for at in (0, 0, 1))
    assert one == again != other
    assert {(choice.layer, choice.expert) for choice in one} == {(layer, expert) for layer in (0, 2) for expert in range(6)}


@pytest.mark.parametrize("rule", [rules.presence_effect, rules.accepted_frequency])
def test_missing_runs_are_named(rule):
    with pytest.raises(RouteError, match="needs the folder of a"):
        rule([], SHAPE)


class TestBudget:
    @pytest.mark.parametrize(("benign", "kept"), [(0.7083, True), (0.75, True), (0.6667, False)])
    def test_what_the_model_gets_wrong_by_itself_is_no_cost(self, benign, kept):
        """17 of 24 harmless prompts are right without a policy: 17 and 18 keep a budget of all, 16 do not."""
        assert Budget(share=1.0).keeps({"benign": benign}, {"benign": 0.7083}, 24, 0) is kept

    def test_confidence_counts_the_prompts_that_were_right(self):
        assert Budget(0.9, confidence=0.8).keeps({"benign": 1.0}, {"benign": 1.0}, 24, 0)
        assert not Budget(0.9, confidence=0.8).keeps({"benign": 0.25}, {"benign": 0.25}, 24, 0)

    def test_over_refusal_is_held_against_the_model_s_own(self):
        own = {"benign": 1.0, "over_refusal": 0.1}
        assert Budget(over_refusal=0.05).keeps({"benign": 1.0, "over_refusal": 0.15}, own, 20, 20)
        assert not Budget(over_refusal=0.05).keeps({"benign": 1.0, "over_refusal": 0.2}, own, 20, 20)
