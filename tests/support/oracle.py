"""What a plan means, said again in plain transformers: the reference that the engine is compared with.

Independent of the package's own compiler and kernels: directives are read from the plan's public list, and the gating of
each directed token is computed one token at a time in float64.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_unsafe_routes import RoutePlan, RoutePolicy

_NO_POLICY = RoutePolicy({})


class Oracle:
    """A transformers model whose routers obey a plan, and a policy for all tokens.

    Args:
        folder: a model saved by `tiny_models.make_model`.

    Attributes:
        policy: what holds for every token.

    """

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        self.config = self.model.config
        self.policy = _NO_POLICY
        self._wishes: dict[int, dict[int, _Wish]] = {}
        self.routes: dict[int, list[tuple[list[int], list[float]]]] = {}
        for layer, block in enumerate(self.model.model.layers):
            for module in block.modules():
                if type(module).__name__.lower().endswith(("topkrouter", "llama4router")):
                    module.register_forward_hook(self._hook(layer, module))
                    break

    def logprobs(self, token_ids: list[int], prompt_len: int, plan: RoutePlan | None) -> torch.Tensor:
        """Log-probabilities of every next token, float32 [len(token_ids), vocab]."""
        self._wishes = _read_wishes(plan or RoutePlan(), len(token_ids), prompt_len, self.policy)
        self.routes = {}
        with torch.no_grad():
            logits = self.model(torch.tensor([token_ids])).logits[0]
        return logits.float().log_softmax(-1)

    def router_logits(self, token_ids: list[int], prompt_len: int, plan: RoutePlan | None) -> torch.Tensor:
        """What each router computes, float32 [len(token_ids), MoE layers, num_experts], as transformers itself gives it back."""
        self._wishes = _read_wishes(plan, len(token_ids), prompt_len) if plan is not None else {}
        with torch.no_grad():
            found = self.model(torch.tensor([token_ids]), output_router_logits=True).router_logits
        return torch.stack([rows.reshape(len(token_ids), -1).float() for rows in found if rows is not None], 1)

    def token_logprobs(self, token_ids: list[int], prompt_len: int, plan: RoutePlan | None) -> list[float]:
        """Log-probability of each token after the first, given those before it."""
        rows = self.logprobs(token_ids, prompt_len, plan)
        return [rows[at, token].item() for at, token in enumerate(token_ids[1:])]

    def _hook(self, layer: int, module: Any) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> Any:
            if isinstance(output[1], torch.Tensor) and len(output) == 2:  # Llama-4: dense scores
                scores, logits = output
                for at, wish in self._wishes.get(layer, {}).items():
                    weights, ids = self._route(module, logits[at], wish)
                    scores[at] = 0
                    scores[at, ids] = weights.to(scores.dtype)
                return scores, logits
            ids_first = output[0].dtype == torch.long  # Granite returns (ids, weights, logits)
            logits, weights, ids = (output[2], output[1], output[0]) if ids_first else output
            weights, ids = weights.clone(), ids.clone()
            for at, wish in self._wishes.get(layer, {}).items():
                new_weights, new_ids = self._route(module, logits[at], wish)
                weights[at], ids[at] = new_weights.to(weights.dtype), torch.tensor(new_ids)
            self.routes[layer] = list(zip(ids.tolist(), weights.tolist(), strict=True))
            return (ids, weights, logits) if ids_first else (logits, weights, ids)

        return hook

    def _route(self, module: Any, logits: torch.Tensor, wish: _Wish) -> tuple[torch.Tensor, list[int]]:
        """Weights (float64 [top_k]) and ids of one token."""
        config = self.config
        num_experts, kind = logits.shape[-1], config.model_type
        top_k = config.num_experts_per_tok
        allowed = sorted(set(range(num_experts)) - wish.disabled)
        biased, steered = wish.change(logits.double(), allowed)
        if wish.weights is not None:
            # What the router hands on; these families scale the experts' sum afterwards.
            scale = getattr(config, "routed_scaling_factor", None) or 1.0
            return torch.tensor(wish.weights, dtype=torch.float64) * scale, wish.forced
        if kind == "phimoe":
            from transformers.models.phimoe.modeling_phimoe import sparsemixer

            keep = wish.forced or allowed
            masked = torch.full_like(logits, -math.inf)
            masked[keep] = steered.float()[keep]
            weights, ids = sparsemixer(masked[None], jitter_eps=module.router_jitter_noise, training=False, top_k=top_k)
            return weights[0].double(), ids[0].tolist()
        sigmoid = kind in ("deepseek_v3", "glm4_moe", "llama4_text")
        renormalize = kind in ("mixtral", "granitemoe", "gpt_oss") or (
            kind != "llama4_text" and kind != "deepseek_v2" and bool(getattr(config, "norm_topk_prob", False))
        )

        def score(values: torch.Tensor, keep: list[int]) -> torch.Tensor:
            if sigmoid:
                return values.sigmoid()
            masked = torch.full_like(values, -math.inf)
            masked[keep] = values[keep]
            return masked.softmax(-1)

        native = score(logits.double(), list(range(num_experts)))
        selected_from = score(steered, wish.forced or allowed)
        choice = score(biased, allowed)
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            choice = choice + bias.double()
        if wish.forced:
            ids = wish.forced
        else:
            ids = sorted(wish.promoted)
            left = [expert for expert in allowed if expert not in wish.promoted | wish.demoted]
            for among in (left, [expert for expert in allowed if expert in wish.demoted]):
                groups = (getattr(config, "n_group", None), getattr(config, "topk_group", None))
                ids += _pick(choice, among, top_k - len(ids), *groups, bias, wish.promoted)
        weights = (native if wish.native else selected_from)[ids]
        if renormalize:
            weights = weights / weights.sum()
        scale = getattr(config, "routed_scaling_factor", None)
        return weights * (scale or 1.0), ids


class _Wish:
    """All directives of one (layer, position) together."""

    def __init__(self, native: bool) -> None:
        self.native = native
        self.disabled: set[int] = set()
        self.forced: list[int] = []
        self.weights: tuple[float, ...] | None = None
        self.bias: dict[int, float] = {}
        self.promoted: set[int] = set()
        self.demoted: set[int] = set()

    def change(self, logits: torch.Tensor, allowed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits with the biases, and with the promoted and demoted experts beside largest and smallest; a force wants none."""
        if self.forced:
            return logits, logits
        biased = logits.clone()
        for expert, value in self.bias.items():
            biased[expert] += value
        steered = biased.clone()
        steered[list(self.promoted)] = biased[allowed].max() + 0.01
        steered[list(self.demoted)] = biased[allowed].min() - 0.01
        return biased, steered


def _read_wishes(
    plan: RoutePlan, num_tokens: int, prompt_len: int, policy: RoutePolicy = _NO_POLICY
) -> dict[int, dict[int, _Wish]]:
    everything = set(range(4096))
    wishes: dict[int, dict[int, _Wish]] = {}
    for layer, entry in policy.layers.items():
        if entry.disabled or entry.bias:
            wishes[layer] = {position: _Wish(policy.weights == "native") for position in range(num_tokens)}
            for wish in wishes[layer].values():
                wish.disabled, wish.bias = set(entry.disabled), dict(entry.bias)
    for item in plan.directives:
        spans = {"prompt": range(prompt_len), "generated": range(prompt_len, num_tokens), "all": range(num_tokens)}
        positions = spans[item.positions] if isinstance(item.positions, str) else item.positions
        for position in positions:
            if position >= num_tokens:
                continue
            wish = wishes.setdefault(item.layer, {}).setdefault(position, _Wish(False))
            wish.native = plan.weights == "native"
            if item.kind == "disable":
                wish.disabled |= set(item.experts)
            elif item.kind == "allow":
                wish.disabled |= everything - set(item.experts)
            elif item.kind == "promote":
                wish.promoted |= set(item.experts)
            elif item.kind == "demote":
                wish.demoted |= set(item.experts)
            elif item.kind == "bias":
                for expert, value in zip(item.experts, item.weights, strict=True):
                    wish.bias[expert] = wish.bias.get(expert, 0.0) + value
            else:
                wish.forced, wish.weights = list(item.experts), item.weights
    return wishes


def _pick(
    choice: torch.Tensor,
    allowed: list[int],
    top_k: int,
    num_groups: int | None,
    topk_group: int | None,
    bias: Any,
    promoted: set[int],
) -> list[int]:
    """Selection with the family's group limits, over the allowed experts only; the promoted ones count for their groups."""

    def best(ids: list[int], count: int) -> list[int]:
        return sorted(ids, key=lambda expert: (-choice[expert].item(), expert))[:count]

    if not num_groups or num_groups == 1:
        return best(allowed, top_k)
    size = len(choice) // num_groups
    score = {}
    for group in range(num_groups):
        members = best([expert for expert in {*allowed, *promoted} if expert // size == group], 1 if bias is None else 2)
        score[group] = sum(choice[expert].item() for expert in members) if members else -math.inf
    groups = sorted(score, key=lambda group: (-score[group], group))[:topk_group]
    inside = best([expert for expert in allowed if expert // size in groups], top_k)
    outside = best([expert for expert in allowed if expert // size not in groups], top_k - len(inside))
    return inside + outside
