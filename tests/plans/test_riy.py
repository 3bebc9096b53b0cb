"""RIY's profiles of pruned experts as policies, and back."""

import json

import pytest

from vllm_unsafe_routes import LayerPolicy, ModelShape, RoutePolicy
from vllm_unsafe_routes.cli import main
from vllm_unsafe_routes.errors import RouteError
from vllm_unsafe_routes.riy import load_riy, policy_of_riy, riy_of_policy

SHAPE = ModelShape("qwen3_moe", 4, 64, (0, 2, 3), num_experts=8, top_k=2)
PAIRS = [[0, 3], [0, 6], [2, 1]]
DISABLED = {0: {3, 6}, 2: {1}}


@pytest.mark.parametrize(
    "profile",
    [
        {"version": 1, "model": "zorblax", "workload": "live capture", "pruned_experts": PAIRS},
        {"pruned_experts": PAIRS},
        {"version": 2, "routing_mode": "pre_topk_mask", "pruned_experts": PAIRS},
        {"layers": {"0": [3, 6], "2": [1]}},
    ],
    ids=["version 1", "no version", "version 2", "by layer"],
)
def test_a_profile_is_a_policy(profile, tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    policy = load_riy(tmp_path / "profile.json", SHAPE)
    assert {layer: entry.disabled for layer, entry in policy.layers.items()} == DISABLED
    assert (policy.weights, policy.model) == ("masked", SHAPE.fingerprint)
    back = riy_of_policy(policy)
    assert back["pruned_experts"] == PAIRS and back["version"] == 1
    assert policy_of_riy(back, SHAPE) == policy
    assert {name: back.get(name) for name in ("model", "workload")} == {name: profile.get(name) for name in ("model", "workload")}


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object, got list"),
        ({"version": 3, "pruned_experts": []}, "version 3 is not one of 1, 2"),
        ({"version": True, "pruned_experts": []}, "version True is not one of 1, 2"),
        ({"version": 2, "pruned_experts": []}, "routing_mode None is not one of"),
        ({"version": 2, "routing_mode": "post_topk_drop", "pruned_experts": []}, "drops experts behind the top_k"),
        ({"version": 1}, "one of 'pruned_experts' and 'layers' is needed"),
        ({"pruned_experts": [], "layers": {}}, "and only one"),
        ({"pruned_experts": {"0": [1]}}, "must be a list of .*, got dict"),
        ({"pruned_experts": [[0, 1], [0]]}, r"pruned_experts\[1\] must be \[layer, expert\], got \[0\]"),
        ({"pruned_experts": [[0, 1.5]]}, r"pruned_experts\[0\] must be"),
        ({"pruned_experts": [[0, True]]}, r"pruned_experts\[0\] must be"),
        ({"layers": {"first": [1]}}, r"pruned_experts\[0\] must be \[layer, expert\], got \['first', 1\]"),
        ({"layers": {"0": 1}}, "layers must be an object of layer -> list"),
        ({"pruned_experts": [[0, 1], [0, 1]]}, "layer 0: expert 1 is pruned twice"),
        ({"pruned_experts": [[1, 1]]}, "layer 1 has no experts"),
        ({"pruned_experts": [[0, 8]]}, "expert 8 is out of range for 8 experts"),
        ({"layers": {"0": [0, 1, 2, 3, 4, 5, 6]}}, "layer 0: 1 experts left, top_k 2 are needed"),
    ],
)
def test_what_is_no_policy(profile, message):
    with pytest.raises(RouteError, match=f"RIY profile: .*{message}"):
        policy_of_riy(profile, SHAPE)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (RoutePolicy({0: LayerPolicy(frozenset({1}))}, weights="native"), "cannot say weights 'native'"),
        (RoutePolicy({2: LayerPolicy(protected=frozenset({1}))}), "policy layer 2: a RIY profile cannot say 'protected'"),
        (RoutePolicy({3: LayerPolicy(bias={1: 0.5})}), "policy layer 3: a RIY profile cannot say 'bias'"),
    ],
)
def test_what_is_no_profile(policy, message):
    with pytest.raises(RouteError, match=message):
        riy_of_policy(policy)


def test_there_and_back_by_command(tmp_path, capsys):
    profile, policy, back = (tmp_path / name for name in ("profile.json", "policy.json", "back.json"))
    profile.write_text(json.dumps({"version": 1, "model": "zorblax", "pruned_experts": [[0, 3], [2, 1]]}))
    assert main(["riy", str(profile), str(policy), "--model", "lab"]) == 0
    assert "2 disabled experts at 2 layers" in capsys.readouterr().out
    assert RoutePolicy.load(policy).layers[0].disabled == {3}
    assert main(["riy", str(policy), str(back), "--model", "lab"]) == 0
    assert json.loads(back.read_text()) == json.loads(profile.read_text())
    profile.write_text(json.dumps({"pruned_experts": [[0, 99]]}))
    assert main(["riy", str(profile), str(policy), "--model", "lab"]) == 1
    assert "profile.json: RIY profile: policy layer 0: expert 99 is out of range" in capsys.readouterr().err
