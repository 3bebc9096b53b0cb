"""A router that is bound and not asked, and router logits that are no numbers: neither goes unseen."""

import inspect
import logging
import shutil

import pytest
import torch
from engines import SETTINGS, engine, generate

from vllm_unsafe_routes import RouteError, RoutePlan

POLICY = {"version": "route-policy/1", "layers": {str(layer): {"disabled": [0, 1]} for layer in range(3)}}
PLAN = RoutePlan().disable(1, "all", [2]).extra_args()


@pytest.fixture
def go_around(monkeypatch):
    """`go_around(slot, when)`: at steps whose number of tokens `when` says, a layer picks experts as a kernel of its own would."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

    own = BaseRouter.select_experts

    def install(slot, when):
        def select_experts(self, hidden_states, router_logits, *args, **kwargs):
            bound = self.__dict__.get("_compute_routing")
            is_it = bound is not None and inspect.getclosurevars(bound.__func__).nonlocals["slot"] == slot
            if not is_it or not when(len(hidden_states)):
                return own(self, hidden_states, router_logits, *args, **kwargs)
            del self._compute_routing
            try:
                return own(self, hidden_states, router_logits, *args, **kwargs)
            finally:
                self._compute_routing = bound

        monkeypatch.setattr(BaseRouter, "select_experts", select_experts)

    return install


@pytest.fixture
def broken_model(tiny_model, tmp_path):
    """`broken_model(breaks)`: a model in whose file `breaks(weights)` has changed something."""
    from safetensors.torch import load_file, save_file

    def make(breaks):
        folder = shutil.copytree(tiny_model("olmoe"), tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        breaks(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def gate(layer):
    return f"model.layers.{layer}.mlp.gate.weight"


def counts(llm):
    return llm.llm_engine.engine_core.engine_core.unsafe_routes_status()["counts"]


@pytest.mark.parametrize("when", [lambda tokens: tokens == 1, lambda tokens: tokens > 1], ids=["decode steps", "longer steps"])
@pytest.mark.parametrize("routes", [{"policy": POLICY}, {"allow_overrides": True}], ids=["policy", "overrides"])
def test_an_engine_whose_router_is_not_asked_in_warm_up_does_not_start(tiny_model, go_around, when, routes):
    go_around(1, when)
    with (
        pytest.raises(RouteError, match="MoE layer 1: its router is bound, but a warm-up step did not ask it; serve the model"),
        engine(tiny_model("olmoe"), routes),
    ):
        pass


def test_a_step_that_a_bound_router_does_not_see_is_counted(tiny_model, go_around, caplog, monkeypatch):
    prompts = [[5, 6, 7, 8]] * 2
    with engine(tiny_model("olmoe"), {"policy": POLICY}) as llm:
        generate(llm, prompts, [None] * 2, max_tokens=4)
        assert counts(llm)["missed"] == [0, 0, 0]
        go_around(2, lambda tokens: tokens == 2)
        monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
        generate(llm, prompts, [None] * 2, max_tokens=4)
        assert counts(llm)["missed"] == [0, 0, 3]
        assert "Routers were not asked in some steps, by MoE layer [0, 0, " in caplog.text


def test_only_steps_with_a_directive_are_watched(tiny_model, go_around):
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        go_around(0, lambda tokens: True)
        generate(llm, [[5, 6, 7, 8]], [None])
        assert counts(llm)["missed"] == [0, 0, 0]
        generate(llm, [[5, 6, 7, 8]], [PLAN], max_tokens=3)
        assert counts(llm)["missed"] == [3, 0, 0]


@pytest.mark.parametrize("routes", [{"policy": POLICY}, {"allow_overrides": True}], ids=["policy", "plan"])
def test_nan_logits_are_counted(broken_model, routes):
    folder = broken_model(lambda weights: weights[gate(1)][3].fill_(torch.nan))
    extra = PLAN if "allow_overrides" in routes else None
    with engine(folder, routes) as llm:
        generate(llm, [[5, 6, 7, 8]], [extra], max_tokens=3)
        assert counts(llm)["num_nan"][:2] == [0, 4 + 2]
        assert counts(llm)["missed"] == [0, 0, 0]


@pytest.mark.v1_only
def test_a_gate_that_cannot_gate_is_named_at_the_start(broken_model, caplog, monkeypatch):
    def breaks(weights):
        weights[gate(0)].zero_()
        weights[gate(2)][3, 1] = torch.inf

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with engine(broken_model(breaks), {"allow_overrides": True}):
        pass
    assert {record.getMessage() for record in caplog.records if "the gate" in record.getMessage()} == {
        "MoE layer 0: the gate model.layers.0.mlp.gate says the same of all experts: every token gets the first ones",
        "MoE layer 2: the gate model.layers.2.mlp.gate is not finite: its routes mean nothing",
    }


@pytest.mark.v1_only
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_a_gate_that_gates_is_not_named(tiny_model, caplog, monkeypatch, family):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with engine(tiny_model(family), {"allow_overrides": True}, **SETTINGS.get(family, {})):
        pass
    assert "the gate" not in caplog.text
