"""`unsafe-routes doctor` on the CPU engine: what it prints, and when it says no."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from vllm_unsafe_routes.lab import model_path


def doctor(*options, **environment):
    """Exit status and lines of a fresh process; wrapping vLLM cannot be undone in this one."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_unsafe_routes.cli", "doctor", *map(str, options)],
        env={**os.environ, "TRITON_INTERPRET": "0", "VLLM_USE_V2_MODEL_RUNNER": "0", **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


@pytest.mark.v1_only
def test_the_lab_model_would_be_bound():
    status, lines, err = doctor("--model", "lab")
    assert status == 0, err
    facts = dict(line.split("  ", 1) for line in lines if "  " in line)
    assert {"python", "torch", "triton", "transformers", "vllm-unsafe-routes"} <= facts.keys()
    assert facts["plugin"].strip() == "loaded as engine processes load it"
    assert facts["model runner"].strip() == "V1 (VLLM_USE_V2_MODEL_RUNNER)"
    found, total = facts["vLLM symbols"].strip().removesuffix(" fit").split(" of ")
    assert found == total
    layers = [line for line in lines if line.startswith("layer ")]
    config = json.loads((model_path() / "config.json").read_text())
    assert len(layers) == config["num_hidden_layers"]
    assert any(
        line.startswith("--moe-backend flashinfer_trtllm") and "TrtLlmBf16ExpertsMonolithic (at its logits" in line
        for line in lines
    )
    assert all(line.endswith(": bound") and "CPURouter" in line for line in layers)
    assert lines[-1] == "route control would work"


@pytest.mark.v1_only
def test_a_refused_layer_is_named_with_its_reason(tmp_path):
    config = json.loads((model_path() / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "moe_layers": [0]}))
    status, lines, _ = doctor("--model", tmp_path)
    assert status == 1
    layers = [line for line in lines if line.startswith("layer ")]
    assert layers[0].endswith(": bound")
    assert all("refused: the model's config does not announce it; MoE layers by config are 0-0" in line for line in layers[1:])
    assert any(line.startswith("problem: MoE layer 1 (model.layers.1") for line in lines)
    assert lines[-1] == "route control would not work"


@pytest.mark.v1_only
@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"VLLM_UNSAFE_ROUTES_DISABLE": "1"}, "problem: VLLM_UNSAFE_ROUTES_DISABLE is set: the plugin is off"),
        ({"VLLM_PLUGINS": "others"}, "problem: VLLM_PLUGINS names others, and not unsafe_routes"),
    ],
)
def test_a_plugin_that_vllm_would_not_load(environment, problem):
    status, lines, _ = doctor(**environment)
    assert status == 1
    assert problem in lines
    assert any(line.startswith("plugin ") and line.endswith("not loaded") for line in lines)
