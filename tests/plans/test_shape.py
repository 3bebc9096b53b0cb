"""Which layers of a model have experts, how many and how many a token gets: read off the configs that the families write."""

from __future__ import annotations

import pytest

from vllm_unsafe_routes import ModelShape, RouteError

# Family -> what its config.json says, and (MoE layers, experts, top_k). Eight layers each.
FAMILIES = {
    "afmoe": (dict(num_dense_layers=2, num_experts=16, num_experts_per_tok=4), (range(2, 8), 16, 4)),
    "aria_text": (dict(moe_num_experts=64, moe_topk=6), (range(8), 64, 6)),
    "dbrx": (
        dict(num_hidden_layers=None, n_layers=8, d_model=64, ffn_config=dict(moe_num_experts=16, moe_top_k=4)),
        (range(8), 16, 4),
    ),
    "deepseek_v3": (
        dict(first_k_dense_replace=3, moe_layer_freq=1, n_routed_experts=256, num_experts_per_tok=8),
        (range(3, 8), 256, 8),
    ),
    "ernie4_5_moe": (
        dict(moe_layer_start_index=1, moe_layer_end_index=6, moe_layer_interval=2, moe_num_experts=64, moe_k=6),
        ((1, 3, 5), 64, 6),
    ),
    "gemma4_text": (dict(num_experts=128, top_k_experts=8, enable_moe_block=True), (range(8), 128, 8)),
    "jamba": (
        dict(
            expert_layer_period=2,
            expert_layer_offset=1,
            layers_block_type=["mamba", "attention"] * 4,
            num_experts=16,
            num_experts_per_tok=2,
        ),
        ((1, 3, 5, 7), 16, 2),
    ),
    "lfm2_moe": (dict(num_dense_layers=2, num_experts=32, num_experts_per_tok=4), (range(2, 8), 32, 4)),
    "llama4_text": (dict(moe_layers=[1, 3, 5, 7], num_local_experts=16, num_experts_per_tok=1), ((1, 3, 5, 7), 16, 1)),
    "mimo_v2": (dict(moe_layer_freq=[0, 1, 1, 1, 1, 1, 1, 1], n_routed_experts=16, num_experts_per_tok=4), (range(1, 8), 16, 4)),
    "nemotron_h": (dict(hybrid_override_pattern="MEM*EMME", n_routed_experts=8, num_experts_per_tok=2), ((1, 4, 7), 8, 2)),
    "nemotron_h in words": (
        dict(layers_block_type=["mamba", "moe", "mamba", "attention"] * 2, n_routed_experts=8, num_experts_per_tok=2),
        ((1, 5), 8, 2),
    ),
    "step3_text": (dict(moe_layers_enum="4,5,6,7", moe_num_experts=48, moe_top_k=3), (range(4, 8), 48, 3)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_own_keys_are_read(family):
    keys, (moe_layers, num_experts, top_k) = FAMILIES[family]
    shape = ModelShape.from_hf_config({"model_type": family, "num_hidden_layers": 8, "hidden_size": 64, **keys})
    assert (shape.num_hidden_layers, shape.hidden_size) == (8, 64)
    assert (shape.moe_layers, shape.num_experts, shape.top_k) == (tuple(moe_layers), num_experts, top_k)


def test_a_config_without_layers_is_refused():
    with pytest.raises(RouteError, match=r"has no number of layers \(num_hidden_layers, n_layers, num_layers\)"):
        ModelShape.from_hf_config({"model_type": "none", "num_experts": 8, "num_experts_per_tok": 2})
