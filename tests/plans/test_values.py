"""What stands beside a plan is a value too: nothing that was checked, digested or shared can change afterwards."""

import copy
import json
import pickle

import numpy as np
import pytest

from vllm_unsafe_routes import LayerPolicy, ModelShape, Receipt, RouteError, RoutePlan, RoutePolicy
from vllm_unsafe_routes.compiler import PlanCompiler
from vllm_unsafe_routes.extras import RouteExtras, ScoreSpec
from vllm_unsafe_routes.policy import ActivePolicy

SHAPE = ModelShape("olmoe", 6, 64, (1, 2, 4), num_experts=64, top_k=4)
POLICY = RoutePolicy({1: LayerPolicy(frozenset({7}), frozenset({3}))}, "native", SHAPE.fingerprint, {"rule": "by hand"})
BIASED = RoutePolicy({1: LayerPolicy({7}, {3}, {9: 1.5, 2: -0.25, 4: 0.0})}, "native", SHAPE.fingerprint)


def test_a_policy_keeps_what_it_was_made_of():
    layers, disabled, provenance = {}, {7, 9}, {"rule": "by hand"}
    layers[1] = LayerPolicy(disabled)
    policy = RoutePolicy(layers, provenance=provenance)
    active = ActivePolicy(policy)
    digest = active.digest
    layers[2] = LayerPolicy(frozenset({1}))
    disabled.add(8)
    provenance["rule"] = "another"
    with pytest.raises(TypeError):
        policy.layers[2] = LayerPolicy(frozenset({1}))
    assert policy.digest == active.digest == digest
    assert policy.layers == {1: LayerPolicy(frozenset({7, 9}))} and policy.provenance == {"rule": "by hand"}


def test_a_bias_is_a_read_only_copy_by_expert():
    given = {9: 1.5, 2: -0.25, 4: 0.0}
    entry = LayerPolicy(bias=given)
    given[9] = 3.0
    assert list(entry.bias.items()) == [(2, -0.25), (9, 1.5)]
    with pytest.raises(TypeError):
        entry.bias[2] = 1.0
    assert copy.deepcopy(entry) == pickle.loads(pickle.dumps(entry)) == entry


def test_a_policy_without_a_bias_is_what_it_was_before_there_was_one():
    policy = RoutePolicy({3: LayerPolicy({7, 1}, {3}), 5: LayerPolicy({0}, bias={2: 0.0})}, "native")
    assert policy.digest == "6212b20ed998d422c2ea8d8505607455" and policy.to_dict()["version"] == "route-policy/1"
    with pytest.raises(RouteError, match="policy layer 1 has unknown keys bias; known are disabled, protected"):
        RoutePolicy.from_json({"version": "route-policy/1", "layers": {"1": {"bias": {"2": 1.0}}}})


def test_a_bias_is_part_of_the_file_and_of_the_digest():
    document = BIASED.to_dict()
    assert document["version"] == "route-policy/2"
    assert document["layers"] == {"1": {"disabled": [7], "protected": [3], "bias": {"2": -0.25, "9": 1.5}}}
    again = RoutePolicy.from_json(json.dumps(document))
    assert again == BIASED and again.digest == BIASED.digest
    digests = {RoutePolicy({1: LayerPolicy({7}, {3}, bias)}).digest for bias in ({}, {2: 1.0}, {2: 1.5}, {3: 1.0})}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerPolicy([1.5]), r"disabled\[0\] must be an integer, got 1.5"),
        (lambda: LayerPolicy(protected={-1}), r"protected\[0\] -1 is out of range"),
        (lambda: LayerPolicy(bias={-1: 1.0}), r"bias\[0\] -1 is out of range"),
        (lambda: LayerPolicy(bias=5), "bias must be a mapping of expert -> value, got 5"),
        (lambda: LayerPolicy(bias=((2, 1.0),)), r"bias must be a mapping of expert -> value, got \(\(2, 1.0\),\)"),
        (lambda: LayerPolicy(bias={1: float("inf")}), r"policy: bias must be finite float32 numbers, got \[inf\]"),
        (lambda: LayerPolicy({1}, bias={1: 1.0}), "expert 1 is both disabled and biased"),
        (lambda: ActivePolicy(BIASED, "observe"), "policy_mode 'observe' counts picks that are disabled; what a bias moves it"),
        (lambda: RoutePolicy({"3": LayerPolicy()}), r"policy layers\[0\] must be an integer, got '3'"),
        (lambda: RoutePolicy({-1: LayerPolicy()}), r"policy layers\[0\] -1 is out of range"),
        (lambda: RoutePolicy({1: {"disabled": [1]}}), "policy layer 1 must be a LayerPolicy"),
        (lambda: RoutePolicy({}, model=5), "policy model must be a fingerprint string or null, got 5"),
        (lambda: ModelShape("olmoe", 6, 64, (2, 1), 64, 4), r"moe_layers \[2, 1\] must be increasing layer indices \(0-5\)"),
        (lambda: ModelShape("olmoe", 4, 64, (1, 4), 64, 4), r"moe_layers \[1, 4\] must be increasing layer indices \(0-3\)"),
    ],
)
def test_wrong_values_are_refused_when_they_are_made(make, message):
    with pytest.raises(RouteError, match=message):
        make()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("value", [POLICY, BIASED, ActivePolicy(POLICY), SHAPE], ids=["policy", "biased", "active", "shape"])
def test_values_can_be_copied(copied, value):
    assert SHAPE.slot_of_layer[4] == 2 and ActivePolicy(POLICY).digest
    again = copied(value)
    assert again == value
    if value is SHAPE:
        assert again.slot_of_layer == SHAPE.slot_of_layer and hash(again) == hash(SHAPE)


def test_a_shape_keeps_what_it_was_made_of():
    layers = [1, 2, 4]
    shape = ModelShape("olmoe", 6, 64, layers, num_experts=64, top_k=4)
    layers.append(5)
    with pytest.raises(TypeError):
        shape.slot_of_layer[5] = 3
    assert shape == SHAPE and hash(shape) == hash(SHAPE) and shape.fingerprint == SHAPE.fingerprint


def test_a_compiled_plan_is_shared_and_so_never_changes():
    compiler = PlanCompiler(SHAPE)
    text = RoutePlan().force(1, [3], [1, 2, 3, 4]).to_string()
    made = compiler.compile_text(text)
    assert compiler.compile_text(text) is made
    with pytest.raises(ValueError, match="read-only"):
        made.block[0, 0] = 0
    with pytest.raises(AttributeError):
        made.rows.append(b"")
    with pytest.raises(AttributeError):
        made.digest = "another"
    with pytest.raises(ValueError, match="read-only"):
        compiler.compile_text(text, (2, 5, 1, 2, 3, 4)).block[0, 0] = 0


def receipt(**changes):
    ids = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    scores = np.array([[-1.5, np.nan]], np.float32)
    fields = {"plan": "p", "policy": None, "routes_set": 3, "cached_tokens": 0, "route_ids": ids}
    return Receipt(**{**fields, "route_weights": (ids / 7).astype(np.float32), "scores": scores, **changes})


def test_receipts_are_compared_by_content():
    one = receipt()
    assert one == receipt() and Receipt.from_dict(one.to_dict()) == one
    assert one != receipt(routes_set=4) and one != receipt(scores=None)
    assert one != receipt(route_ids=one.route_ids[:, ::-1]) and one != receipt(scores=np.zeros((1, 2), np.float32))
    with pytest.raises(TypeError, match="unhashable"):
        hash(receipt(route_ids=None, route_weights=None, scores=None))


def test_what_a_receipt_was_read_from_stays_as_it_is():
    again = Receipt.from_dict(receipt().to_dict())
    for array in (again.route_ids, again.route_weights, again.scores):
        assert not array.flags.writeable


def test_scores_asked_for_are_compared_by_content():
    one, other = (RouteExtras(score=ScoreSpec.from_flat([3, 2, *ids])) for ids in ([5, 6, 7, 8], [5, 6, 7, 9]))
    assert RouteExtras.parse(one.to_extra_args()) == one != other
    assert not one.score.token_ids.flags.writeable
    with pytest.raises(TypeError, match="unhashable"):
        hash(one.score)
