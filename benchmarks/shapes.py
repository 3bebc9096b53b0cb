"""Shapes of models, and the operations and bytes that a forward pass cannot do without.

shapes.json holds them by size: "full" as published (from each model's config.json; no weights are involved), "cpu" for measurements
on a few cores, "tiny" for rehearsals (head and latent sizes are those that CPU attention takes). docs/gpu.md has the formulas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = 2  # of a bfloat16 value
SHAPES: dict[str, dict[str, dict[str, Any]]] = json.loads(Path(__file__).with_name("shapes.json").read_text())
NAMES = {
    "olmoe": "OLMoE-1B-7B",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B",
    "deepseek_v2_lite": "DeepSeek-V2-Lite",
    "mixtral": "Mixtral-8x7B",
}


def config_of(key: str, size: str = "full", num_layers: int | None = None) -> dict[str, Any]:
    """A model's config.json as a dict.

    Args:
        key: of `NAMES`.
        size: "full", "cpu" or "tiny".
        num_layers: another number of layers.

    """
    config = {**SHAPES["full"][key], **SHAPES[size][key]}
    return config | ({} if num_layers is None else {"num_hidden_layers": num_layers})


def make_model(folder: Path, config: Mapping[str, Any], dtype: str | None = None) -> Path:
    """Save a config for `load_format="dummy"`; with a dtype also random weights, the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if dtype is not None:
        import torch
        import transformers

        torch.manual_seed(0)
        made = transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype)).save_pretrained(folder)
    return folder


def enliven(llm: Any, num_experts: int) -> None:
    """Give dummy weights router logits of a model's size; in place, for captured graphs read the same memory."""

    def change(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.fill_(1.0)
            elif name.endswith("gate.weight") and parameter.shape[0] == num_experts:
                parameter.data.normal_(0, 2 * parameter.shape[1] ** -0.5)

    llm.apply_model(change)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameters of a model's pieces, one layer each where a layer is meant.

    Attributes:
        hidden: values of a token between two layers.
        attention: of one layer.
        expert: one routed expert.
        shared: shared experts of one MoE layer, their gate included.
        router: of one MoE layer.
        dense: the MLP of one layer without experts.
        head: the output matrix; the embedding is as large.
        num_layers, num_moe_layers, num_experts, top_k: counts.
        kv_values: values that one token adds to one layer's KV cache.
        attention_width: multiply-adds of one (query token, key token) pair in one layer.

    """

    hidden: int
    attention: int
    expert: int
    shared: int
    router: int
    dense: int
    head: int
    num_layers: int
    num_moe_layers: int
    num_experts: int
    top_k: int
    kv_values: int
    attention_width: int

    @property
    def total(self) -> int:
        """All parameters but norms."""
        of_moe = self.num_experts * self.expert + self.shared + self.router
        dense = (self.num_layers - self.num_moe_layers) * self.dense
        return self.num_layers * self.attention + self.num_moe_layers * of_moe + dense + 2 * self.head


def sizes_of(config: Mapping[str, Any]) -> Sizes:
    """Read the sizes off a config."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    moe_layers = layers - config.get("first_k_dense_replace", 0)
    experts = config.get("num_experts") or config.get("n_routed_experts") or config["num_local_experts"]
    expert_width = config.get("moe_intermediate_size") or config["intermediate_size"]
    if config["model_type"] == "deepseek_v2":
        latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
        query = hidden * heads * (nope + rope)
        attention = query + hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
        kv_values, width = latent + rope, heads * (2 * latent + rope)
        shared = 3 * hidden * config["n_shared_experts"] * expert_width
    else:
        size = hidden // heads
        attention = 2 * hidden * heads * size + 2 * hidden * config["num_key_value_heads"] * size
        kv_values, width = 2 * config["num_key_value_heads"] * size, 2 * heads * size
        shared_width = config.get("shared_expert_intermediate_size", 0)
        shared = 3 * hidden * shared_width + (hidden if shared_width else 0)
    return Sizes(
        hidden=hidden,
        attention=attention,
        expert=3 * hidden * expert_width,
        shared=shared,
        router=hidden * experts,
        dense=3 * hidden * config["intermediate_size"],
        head=config["vocab_size"] * hidden,
        num_layers=layers,
        num_moe_layers=moe_layers,
        num_experts=experts,
        top_k=config["num_experts_per_tok"],
        kv_values=kv_values,
        attention_width=width,
    )


def weight_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of the weights in bfloat16."""
    return BYTES * sizes_of(config).total


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device was measured to do.

    Attributes:
        bytes_per_s: a large copy, bytes read and written counted.
        flops_per_s: a large bfloat16 matrix product.

    """

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Forward:
    """One forward pass.

    Attributes:
        num_tokens: tokens in it.
        num_logit_rows: tokens whose logits are computed.
        pairs: sum over its tokens of the keys that each attends to.
        kv_tokens: tokens whose KV is read, each once per request.

    """

    num_tokens: int
    num_logit_rows: int
    pairs: int
    kv_tokens: int


def distinct_experts(sizes: Sizes, num_tokens: int) -> float:
    """Expected number of a layer's experts that some token of a batch uses, if all are equally likely."""
    return sizes.num_experts * (1 - (1 - sizes.top_k / sizes.num_experts) ** num_tokens)


def work_of(sizes: Sizes, forward: Forward) -> dict[str, tuple[float, float]]:
    """Category -> (bytes, operations) of one forward pass."""
    tokens = forward.num_tokens
    dense_layers = sizes.num_layers - sizes.num_moe_layers
    dense = sizes.num_layers * sizes.attention + sizes.num_moe_layers * sizes.shared + dense_layers * sizes.dense
    experts = sizes.num_moe_layers * sizes.expert
    kv = BYTES * sizes.num_layers * sizes.kv_values
    routing = sizes.num_moe_layers * tokens * (sizes.num_experts * BYTES + 8 * sizes.top_k + 4)
    return {
        "experts": (BYTES * experts * distinct_experts(sizes, tokens), 2.0 * tokens * sizes.top_k * experts),
        "dense matrices": (
            BYTES * (dense + sizes.num_moe_layers * sizes.router + (sizes.head if forward.num_logit_rows else 0)),
            2.0 * tokens * (dense + sizes.num_moe_layers * sizes.router) + 2.0 * forward.num_logit_rows * sizes.head,
        ),
        "attention": (
            kv * (forward.kv_tokens + tokens),
            2.0 * sizes.num_layers * sizes.attention_width * forward.pairs,
        ),
        "routing": (float(routing), 0.0),
    }


def floors_of(sizes: Sizes, forward: Forward, ceilings: Ceilings) -> dict[str, float]:
    """Category -> seconds that one forward pass needs at least: the larger of its bytes and its operations."""
    return {
        name: max(moved / ceilings.bytes_per_s, operations / ceilings.flops_per_s)
        for name, (moved, operations) in work_of(sizes, forward).items()
    }


def differing_operations(sizes: Sizes, prompt: int, target: int) -> float:
    """Operations of what differs between the candidates of a cell, two a multiply-add, averaged over the cells of an F-SOUR run.

    A candidate at (position t, layer l) has experts of its own for token t at layer l; its router, attention and shared experts
    there are the base's. In the layers behind l the tokens from t on are its own: in the last of them, K and V of all, everything
    else of the scored tokens only; behind it, the output layer of these. The last layer is a cell at the last position only. Norms,
    rotary embeddings, activations and softmaxes are not counted.

    Args:
        sizes: the model; all layers behind a cell's have experts.
        prompt: prompt tokens, each a position.
        target: scored tokens.

    """
    routed = 2.0 * sizes.top_k * sizes.expert
    token = 2.0 * (sizes.attention + sizes.router + sizes.shared) + routed
    pair, kv, head = 2.0 * sizes.attention_width, 2.0 * sizes.hidden * sizes.kv_values, 2.0 * sizes.head
    num_tokens, first_layer, last_layer = prompt + target - 1, sizes.num_layers - sizes.num_moe_layers, sizes.num_layers - 1

    def pairs(first: int) -> int:
        return (num_tokens * (num_tokens + 1) - first * (first + 1)) // 2

    last = target * (token - kv + head) + pair * pairs(prompt - 1)
    found = [routed + head]
    for position in range(prompt):
        own = num_tokens - position
        whole = own * token + pair * pairs(position)
        found += [routed + (last_layer - 1 - layer) * whole + own * kv + last for layer in range(first_layer, last_layer)]
    return sum(found) / len(found)
