"""Tiny random MoE models of many families, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 128
# What all families share. Head size 32 is the smallest that the CPU engine's attention takes.
_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=2,
    num_hidden_layers=3,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    torch_dtype="float32",
)
_LATENT = dict(  # multi-head latent attention of the DeepSeek families; the CPU kernel knows one latent size, 512 + 64
    q_lora_rank=None,
    kv_lora_rank=512,
    qk_nope_head_dim=32,
    qk_rope_head_dim=64,
    v_head_dim=32,
    head_dim=64,
    rope_theta=10000.0,
)

# family -> (model_type for AutoConfig, extra config)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", dict(num_experts=16, num_experts_per_tok=4, norm_topk_prob=False)),
    "qwen2_moe": (
        "qwen2_moe",
        dict(
            num_experts=12,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            decoder_sparse_step=1,
            norm_topk_prob=False,
        ),
    ),
    "qwen3_moe": (
        "qwen3_moe",
        dict(
            num_hidden_layers=4,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            mlp_only_layers=[1],
            head_dim=32,
            norm_topk_prob=True,
        ),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=8, num_experts_per_tok=2)),
    "deepseek_v2": (
        "deepseek_v2",
        dict(
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            n_group=4,
            topk_group=2,
            topk_method="group_limited_greedy",
            norm_topk_prob=False,
            routed_scaling_factor=1.5,
            moe_layer_freq=1,
            scoring_func="softmax",
            **_LATENT,
        ),
    ),
    "deepseek_v3": (
        "deepseek_v3",
        dict(
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            n_group=4,
            topk_group=2,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            moe_layer_freq=1,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            **_LATENT,
        ),
    ),
    "glm4_moe": (
        "glm4_moe",
        dict(
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            n_group=1,
            topk_group=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.5,
            head_dim=32,
            partial_rotary_factor=0.5,
        ),
    ),
    "granitemoe": ("granitemoe", dict(num_local_experts=8, num_experts_per_tok=2, attention_multiplier=0.176)),
    "phimoe": (
        "phimoe",
        dict(num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.01, input_jitter_noise=0.0),
    ),
    "llama4_text": (
        "llama4_text",
        dict(
            num_local_experts=8,
            num_experts_per_tok=1,
            intermediate_size_mlp=96,
            interleave_moe_layer_step=1,
            head_dim=32,
            no_rope_layers=[1, 1, 1],
            layer_types=["full_attention"] * 3,
            use_qk_norm=False,
            attn_temperature_tuning=False,
        ),
    ),
    "gpt_oss": (
        "gpt_oss",
        dict(
            num_local_experts=8,
            num_experts_per_tok=2,
            head_dim=64,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
}


def make_model(family: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Save a random float32 model of a family; routers are scaled up so that routes differ between tokens."""
    model_type, extra = FAMILIES[family]
    config = transformers.AutoConfig.for_model(model_type, **{**_COMMON, **extra, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                continue
            if is_router(name):
                parameter.normal_(0, 0.6)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
    model.save_pretrained(folder)
    if family == "phimoe":
        # vLLM's own class goes by the checkpoint's original name; under transformers' name it would run transformers' code.
        config_file = folder / "config.json"
        config_file.write_text(config_file.read_text().replace("PhimoeForCausalLM", "PhiMoEForCausalLM"))
    return folder


def is_router(name: str) -> bool:
    """Whether a parameter name is that of a router's weight."""
    return name.endswith(("mlp.gate.weight", "router.weight", "router.layer.weight", "block_sparse_moe.gate.weight"))


def tiny_dense(vocab_size: int) -> Any:
    """A random dense Llama model of four layers, with the tied embeddings of the language lab's."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()
