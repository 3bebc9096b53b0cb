"""Plans as values: building, both wire forms, refusals that need no model."""

import copy
import json
import pickle
import zlib
from base64 import b64encode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unsafe_routes import RouteError, RoutePlan
from vllm_unsafe_routes.plan import parse_plan
from vllm_unsafe_routes.wire import WIRE_PREFIX

experts = st.lists(st.integers(0, 511), min_size=1, max_size=10, unique=True)
positions = st.one_of(
    st.sampled_from(["prompt", "generated", "all"]), st.lists(st.integers(0, 5000), min_size=1, max_size=6, unique=True)
)


@st.composite
def plans(draw):
    plan = RoutePlan(draw(st.sampled_from(["masked", "native"])), draw(st.sampled_from([None, "0123456789abcdef"])))
    for _ in range(draw(st.integers(0, 6))):
        kind, chosen = draw(st.sampled_from(["disable", "allow", "force"])), draw(experts)
        layer, where = draw(st.integers(0, 100)), draw(positions)
        if kind == "force":
            weights = draw(st.none() | st.lists(st.floats(0, 4, width=32), min_size=len(chosen), max_size=len(chosen)))
            plan.force(layer, where, chosen, weights)
        else:
            getattr(plan, kind)(layer, where, chosen)
    return plan


@given(plans())
@settings(max_examples=200, deadline=None)
def test_both_forms_carry_the_whole_plan(plan):
    for again in (
        RoutePlan.from_string(plan.to_string()),
        RoutePlan.from_json(plan.to_json()),
        RoutePlan.from_string(plan.to_json()),
    ):
        assert again == plan
        assert again.digest == plan.digest
        assert again.directives == plan.directives


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: WIRE_PREFIX + b64encode(zlib.compress(raw)).decode()))
@settings(max_examples=300, deadline=None)
def test_garbage_is_refused_not_crashed_on(text):
    with pytest.raises(RouteError):
        RoutePlan.from_string(text)


@pytest.mark.parametrize("cut", [0, 1, 5, 20, -1])
def test_a_damaged_string_is_refused(cut):
    text = RoutePlan().force(1, [3], [1, 2]).disable(0, "all", [5]).to_string()
    with pytest.raises(RouteError, match=r"damaged|cut off|starts with"):
        RoutePlan.from_string(text[:cut])


def test_a_bomb_is_refused_before_it_unpacks():
    bomb = WIRE_PREFIX + b64encode(zlib.compress(bytes(200 << 20), 9)).decode()
    with pytest.raises(RouteError, match="larger than"):
        RoutePlan.from_string(bomb)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RoutePlan(weights="sharp"), "weights 'sharp' is not one of masked, native"),
        (lambda: RoutePlan().force(0, [1], [3, 3]), "expert 3 is repeated"),
        (lambda: RoutePlan().force(0, [1, 1], [3]), "a position is repeated"),
        (lambda: RoutePlan().force(0, [], [3]), "positions is empty"),
        (lambda: RoutePlan().disable(0, "all", []), "experts is empty"),
        (lambda: RoutePlan().disable(0, "suffix", [1]), "positions 'suffix' is not a list or one of"),
        (lambda: RoutePlan().disable(-1, "all", [1]), "layer -1 is out of range"),
        (lambda: RoutePlan().disable(True, "all", [1]), "layer must be an integer, got True"),
        (lambda: RoutePlan().disable(0, "all", [1.5]), r"experts\[0\] must be an integer, got 1.5"),
        (lambda: RoutePlan().force(0, [1], [1, 2], weights=[1.0]), "1 weights for 2 experts"),
        (lambda: RoutePlan().force(0, [1], [1], weights=[float("nan")]), "weights must be finite"),
    ],
)
def test_wrong_whatever_the_model(build, message):
    with pytest.raises(RouteError, match=message):
        build()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"version": "route-plan/2"}, "plan version 'route-plan/2' is not 'route-plan/1'"),
        ({"version": "route-plan/1", "extra": 1}, "plan has unknown keys extra"),
        ({"version": "route-plan/1", "directives": [{"layer": 1, "positions": "all"}]}, "needs exactly one of"),
        ({"version": "route-plan/1", "directives": [{"layer": 1, "force": [1]}]}, "directive 0 lacks 'positions'"),
        (
            {"version": "route-plan/1", "directives": [{"layer": 1, "positions": "all", "disable": [1], "expert": 2}]},
            "directive 0 has unknown keys expert",
        ),
        ({"version": "route-plan/1", "directives": {}}, "directives must be a list"),
        ([], "must be a JSON object"),
    ],
)
def test_bad_json(document, message):
    with pytest.raises(RouteError, match=message):
        RoutePlan.from_json(json.dumps(document))


def test_a_plan_of_a_whole_prompt_stays_small():
    plan = RoutePlan()
    for layer in range(26):
        for position in range(48):
            plan.force(layer, [position], [(layer * 7 + position * 5 + k * 11) % 64 for k in range(6)])
    assert len(plan.to_string()) < 20_000


@pytest.mark.parametrize(("name", "value"), [("model", "feedfacefeedface"), ("weights", "native"), ("weights", "sharp")])
def test_a_plan_is_built_with_its_mode_and_model(name, value):
    plan = RoutePlan().force(1, [3], [1, 2])
    text, digest = plan.to_string(), plan.digest
    with pytest.raises(AttributeError):
        setattr(plan, name, value)
    assert (plan.to_string(), plan.digest) == (text, digest)


def test_string_and_digest_follow_every_directive():
    plan = RoutePlan()
    seen = set()
    for layer in range(4):
        again = RoutePlan.from_string(plan.to_string())
        assert again.digest == plan.digest and again == plan
        seen.add((plan.to_string(), plan.digest))
        assert plan.disable(layer, "all", [1]) is plan
    assert len(seen) == 4


def test_what_can_change_has_no_hash():
    with pytest.raises(TypeError, match="unhashable"):
        hash(RoutePlan())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_is_a_plan_of_its_own(copied):
    plan = RoutePlan("native", "feedfacefeedface").force(1, [3], [1, 2])
    text = plan.to_string()
    other = copied(plan)
    assert other == plan and other.to_string() == text
    other.disable(0, "all", [5])
    assert plan.to_string() == text == RoutePlan("native", "feedfacefeedface").force(1, [3], [1, 2]).to_string()
    assert other != plan and RoutePlan.from_string(other.to_string()) == other


def test_a_remembered_plan_is_nobody_elses():
    text = RoutePlan().disable(1, "all", [5]).to_string()
    parse_plan(text).disable(2, "all", [6])
    assert parse_plan(text).to_string() == text
