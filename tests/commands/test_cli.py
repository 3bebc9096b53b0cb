"""`unsafe-routes inspect` on a config.json alone: what it prints, what it refuses; and the constants kept in two places."""

import argparse
import json
import re
import sys
from importlib.metadata import version

import numpy as np
import pytest

from vllm_unsafe_routes import LayerPolicy, ModelShape, RoutePlan, RoutePolicy, compiled
from vllm_unsafe_routes.cli import main, make_parser

CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 1,
}
SHAPE = ModelShape("qwen3_moe", 4, 64, (0, 2, 3), num_experts=8, top_k=2)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.fixture
def inspect(model, capsys):
    """`inspect(*options)`: exit status, standard output, standard error."""

    def run(*options, path=model):
        status = main(["inspect", str(path), *map(str, options)])
        return status, *capsys.readouterr()

    return run


def write(path, content):
    path.write_text(content)
    return path


def test_a_model_alone(inspect, model):
    status, out, err = inspect("--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "model_type": "qwen3_moe",
        "fingerprint": SHAPE.fingerprint,
        "decoder_layers": 4,
        "moe_layers": [0, 2, 3],
        "experts": 8,
        "top_k": 2,
        "native_weights": True,
    }
    assert inspect("--json", path=model / "config.json")[1] == out


def test_text_output_has_a_line_for_each_fact(inspect):
    status, out, _ = inspect()
    assert status == 0
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "model type",
        "fingerprint",
        "decoder layers",
        "moe layers",
        "experts",
        "top k",
        "native weights",
    ]
    assert "0, 2, 3" in out


def test_a_model_with_a_text_part_is_read_there(inspect, tmp_path):
    path = write(tmp_path / "composite.json", json.dumps({"model_type": "composite", "text_config": CONFIG}))
    assert json.loads(inspect("--json", path=path)[1])["fingerprint"] == SHAPE.fingerprint


@pytest.mark.parametrize("form", ["to_json", "to_string"])
def test_a_plan_that_fits(inspect, model, form):
    plan = RoutePlan(model=SHAPE.fingerprint).force(2, [5], [1, 7]).disable(0, "all", [3])
    status, out, _ = inspect("--json", "--plan", write(model / "plan", getattr(plan, form)() + "\n"))
    facts = json.loads(out)
    assert status == 0
    assert facts["plan"] == plan.digest
    assert (facts["plan_directives"], facts["plan_rows"], facts["plan_needs_prompt_tokens"]) == (2, 2, 6)
    assert "policy" not in facts


def test_a_plan_is_checked_under_the_policy(inspect, model):
    policy = RoutePolicy({2: LayerPolicy({7}, {1}, {3: 0.5, 4: -0.5})})
    policy.save(model / "policy.json")
    plan = write(model / "plan.json", RoutePlan().force(2, [5], [1, 7]).to_json())
    status, out, _ = inspect("--json", "--policy", model / "policy.json")
    assert (status, json.loads(out)["policy"]) == (0, policy.digest)
    assert json.loads(out)["policy_says"] == "1 disabled, 1 protected, 2 biased in 1 layers, weights masked"
    assert inspect("--plan", plan)[0] == 0
    status, out, err = inspect("--plan", plan, "--policy", model / "policy.json")
    assert (status, out) == (1, "")
    assert err == "unsafe-routes: layer 2, position 5: expert 7 is disabled by the engine's policy and cannot be forced\n"


def forced_with(weight):
    item = {"layer": 0, "positions": [1], "force": [1, 2], "weights": [0.5, weight]}
    return json.dumps({"version": "route-plan/1", "directives": [item]}).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("--plan", None, "plan file .* cannot be read"),
        ("--plan", b"zorblax", "expected 'rp1:' or 'rp2:' or a JSON object"),
        ("--plan", b"\xff\xfe", "plan file .* cannot be read"),
        (
            "--plan",
            b'{"version": "route-plan/1", "directives": [{"layer": 0, "positions": "all", "disable": [1], "disable": [2]}]}',
            "the plan is not JSON: key 'disable' is given twice",
        ),
        ("--plan", b'{"directives": ' + b"[" * 100_000, "the plan is not JSON: maximum recursion depth"),
        ("--plan", forced_with(10**39), "weights must be finite float32 numbers"),
        ("--plan", forced_with(10**400), "weights must be a list of numbers"),
        ("--plan", RoutePlan().disable(1, "all", [3]).to_string().encode(), "layer 1 has no experts; MoE layers are 0, 2, 3"),
        ("--plan", RoutePlan(model="feed").to_string().encode(), "the plan is for model feed, this engine serves"),
        ("--policy", None, "policy file .* cannot be read"),
        ("--policy", b"[]", "policy file .*: the policy must be a JSON object"),
        ("--policy", b'{"version": "route-policy/1", "layers": {"2": {}, "02": {}}}', "policy layer 02 is given twice"),
        ("--policy", b'{"version": "route-policy/1", "layers": {"2": {"disabled": [1]}, "2": {}}}', "key '2' is given twice"),
        ("--policy", b'{"version": "route-policy/1", "layers": {"1": {}}}', "policy layer 1 has no experts"),
    ],
    ids=[
        "no plan",
        "not a plan",
        "binary plan",
        "key twice",
        "nested too deep",
        "weight past float32",
        "weight past float64",
        "wrong layer",
        "other model",
        "no policy",
        "not a policy",
        "layer twice",
        "layer key twice",
        "wrong policy layer",
    ],
)
def test_what_does_not_fit_is_one_line_and_status_1(inspect, model, name, content, message):
    path = model / "given"
    if content is not None:
        path.write_bytes(content)
    status, out, err = inspect(name, path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("unsafe-routes: ")
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "model config .* cannot be read"),
        (b"{", "model config .* cannot be read"),
        (b"[]", "model config .* is not a JSON object"),
        (b'{"text_config": 3}', "model config .* is not a JSON object"),
        (b'{"model_type": "llama", "num_hidden_layers": 2}', "model_type 'llama' is not an MoE model known here"),
        (json.dumps({**CONFIG, "mlp_only_layers": [0, 1, 2, 3]}).encode(), "'qwen3_moe' has no MoE layer"),
        (json.dumps({**CONFIG, "num_experts_per_tok": 9}).encode(), r"top_k 9 is out of range for 8 experts \(1-8\)"),
    ],
    ids=["missing", "cut off", "a list", "no text part", "dense model", "dense layers only", "top_k too large"],
)
def test_a_model_that_cannot_be_read_or_routed(inspect, tmp_path, content, message):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content)
    status, out, err = inspect(path=path)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert re.search(message, err)


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["inspect", "model", "--plans", "x"], ["unknown"]])
def test_wrong_usage_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: unsafe-routes" in capsys.readouterr().err


def parsers():
    """(command, its parser)."""
    actions = make_parser()._actions
    return next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices.items()


@pytest.mark.parametrize(("command", "parser"), parsers(), ids=[name for name, _ in parsers()])
def test_help_teaches(command, parser):
    """A sentence for every option, a description, and a command to paste; `%` and braces are written as they should appear."""
    for action in parser._actions:
        words = re.sub(r"\(default: [^)]*\)|adaptive:", "", action.help or "").split()
        assert len(words) >= 3, f"{command} {action.option_strings or action.dest}: {action.help!r}"
    assert parser.description
    text = parser.format_help()
    assert f"usage: unsafe-routes {command} " in text
    if parser.epilog:
        pasted = text.partition("Example:\n")[2].replace("\\\n", " ").split()
        assert pasted[:2] == ["unsafe-routes", command]
        assert parser.parse_args(pasted[2:])


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"unsafe-routes {version('vllm-unsafe-routes')}\n")


def test_the_help_of_all_names_each_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert [name for name, _ in parsers() if not re.search(rf"^    {name}\b", out, re.MULTILINE)] == []


def test_the_compiler_and_the_kernels_agree_on_a_row():
    """`compiled.py` must not import torch, so it has its own copy of the flags and of the bit order."""
    import torch
    from vllm_unsafe_routes.kernels import spec

    for name in ("FLAG_FORCED", "FLAG_EXPLICIT_WEIGHTS", "FLAG_NATIVE_WEIGHTS", "FLAG_SCORE_BIAS", "FLAG_STEERED"):
        assert getattr(compiled, name) == getattr(spec, name)
    assert compiled.NO_ROW == spec.NO_DIRECTIVE
    layout = compiled.RowLayout(num_experts=70, top_k=2)
    allowed = {0, 31, 32, 63, 64, 69}  # both ends of every word; bit 31 is an int32's sign
    bits = compiled.expert_bits(allowed)
    row = np.frombuffer(layout.mask_row(bits, native=True), "<i4")
    assert len(row) == sum(layout.widths[:4])
    soft = layout.columns(layout.table([layout.mask_row(bits, True, compiled.Soft(((69, 1.5),), bits, bits - 1)), bytes(row)]))
    assert [part.shape[1:] for part in soft] == [(), (3,), (2,), (2,), (6,), (70,)] and layout.num_ints == 84
    mask = torch.zeros(70, dtype=torch.bool)
    mask[sorted(allowed)] = True
    assert row[1 : 1 + layout.num_words].tolist() == spec.pack_allowed(mask).tolist()
    assert row[0] == spec.FLAG_NATIVE_WEIGHTS
    assert soft[4][0].tolist() == spec.pack_allowed(torch.stack([mask, mask & (torch.arange(70) != 0)])).flatten().tolist()
    assert soft[5][0].tolist() == [*[0.0] * 69, 1.5] and not soft[4][1].any()


@pytest.mark.parametrize(("command", "option"), [("derive-policy", "--policy"), ("evaluate", "--server")])
def test_no_option_is_shown_that_is_refused(command, option, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"{option} " not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(
            [
                command,
                "--model",
                "lab",
                "--data",
                "lab:test",
                "--out",
                "x",
                option,
                "x",
                *(["x"] if command == "derive-policy" else []),
            ]
        )
    assert f"unrecognized arguments: {option}" in capsys.readouterr().err


def test_doctor_without_vllm_says_so_and_is_status_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "problem: vLLM cannot be imported: " in out
    assert out.endswith("route control would not work\n")
    assert re.search(r"^python +3\.\d+", out, re.MULTILINE)
