"""Steps that no graph repeats, as a GPU takes them: only layers at which some request has a row are directed.

The engine runs on the CPU and is told that graphs might be captured, and that only the requests' plans say where rows are.
"""

import random

import numpy as np
import pytest
from engines import engine, generate, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RoutePlan, receipt_of
from vllm_unsafe_routes.engine import row_index, worker
from vllm_unsafe_routes.engine.router import LayerBinding, RouterState, controllers

pytestmark = pytest.mark.v1_only  # under the interpreter it would be vLLM's own kernels that take the time

FORCED = RoutePlan().force(1, [0, 2], [5, 3, 8, 1]).disable(1, "generated", [0, 1])
OBSERVED = {"version": "route-policy/1", "layers": {"2": {"disabled": [0, 1, 2, 3, 4, 5]}}}


@pytest.fixture
def asked(monkeypatch):
    """What becomes of the calls of bound routers: name of the binding's method -> MoE slots, until it is cleared."""
    found = {"direct": set(), "leave": set()}

    def watched(name):
        own = getattr(LayerBinding, name)

        def call(self, *args):
            (controller,) = controllers.values()
            found[name] |= {slot for slot, binding in controller.bindings.items() if binding is self}
            return own(self, *args)

        return call

    for name in found:
        monkeypatch.setattr(LayerBinding, name, watched(name))
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Engines that are started from now on."""
    monkeypatch.setattr(worker, "RouterState", lambda **_: RouterState(always=True, rehearses=True))
    monkeypatch.setattr(row_index, "uses_triton", lambda device: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)


def outcomes(llm, *extras):
    rng = random.Random(5)
    prompts = [random_prompt(rng, length, VOCAB_SIZE) for length in (5, 19, 33)]
    outputs = generate(llm, prompts[: len(extras)], list(extras), max_tokens=8)
    return [(list(output.outputs[0].token_ids), output.kv_transfer_params) for output in outputs]


EXTRAS = (
    None,
    FORCED.extra_args(return_routes=True),
    RoutePlan().disable(1, "all", [2]).extra_args(return_routes=True),
)


def test_layers_without_rows_are_left_alone(tiny_model, asked, as_on_a_gpu):
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        assert asked["direct"] == {0, 1, 2}  # warm-up runs what graphs would hold
        for found in asked.values():
            found.clear()
        outcomes(llm, None, None)
        assert asked == {"direct": set(), "leave": set()}
        (controller,) = controllers.values()
        assert not any(controller.counts().missed)
        outcomes(llm, None, FORCED.extra_args())
        assert asked == {"direct": {1}, "leave": {0, 2}}
        assert not any(controller.counts().missed)


def test_what_comes_out_is_the_same(tiny_model, request):
    settings = {"allow_overrides": True, "policy": OBSERVED, "policy_mode": "observe"}
    with engine(tiny_model("olmoe"), settings) as llm:
        expected = outcomes(llm, *EXTRAS)
        counts = llm.llm_engine.engine_core.engine_core.unsafe_routes_status()["counts"]
    request.getfixturevalue("as_on_a_gpu")
    with engine(tiny_model("olmoe"), settings) as llm:
        found = outcomes(llm, *EXTRAS)
        assert llm.llm_engine.engine_core.engine_core.unsafe_routes_status()["counts"] == counts
    assert counts["displaced"]["observe"][2] > 0
    assert found == expected


def test_routes_of_layers_that_are_left_alone_come_back(tiny_model, as_on_a_gpu):
    with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
        outputs = generate(llm, [[5, 6, 7, 8]] * 2, [{"return_routes": True}, FORCED.extra_args(return_routes=True)])
        free, planned = (receipt_of(output).route_ids for output in outputs)
    assert np.array_equal(free[:, 0], planned[:, 0])
    assert [set(row) for row in planned[[0, 2], 1].tolist()] == [{1, 3, 5, 8}] * 2
    assert (planned >= 0).all()
