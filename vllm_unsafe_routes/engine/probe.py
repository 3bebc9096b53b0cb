"""Whether a native gating selects no banned expert when it is given masked logits: hostile ones through the gating itself.

`kernels/mask_logits.py` says what could go wrong. A kernel is controlled at the logits only if nothing of it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from vllm_unsafe_routes.kernels.mask_logits import groups_suffice, mask_bias, mask_logits
from vllm_unsafe_routes.kernels.spec import GatingSpec

# Router logits [num_tokens, num_experts] and correction bias, float [num_experts] or None -> weights and ids [num_tokens, top_k].
Native = Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
# The same -> output of the experts, [num_tokens, hidden_size].
Forward = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
# No case has more tokens.
MOST_TOKENS = 32

_SEED = 7


@dataclass(frozen=True, slots=True, eq=False)
class Hostile:
    """Tokens with one set of banned experts.

    Attributes:
        name: of the bans and the bias, for a message.
        kinds: what is hostile about each token.
        logits: [num_tokens, num_experts], unmasked.
        banned: bool [num_experts].
        bias: float32 [num_experts], unmasked, or None.

    """

    name: str
    kinds: tuple[str, ...]
    logits: torch.Tensor
    banned: torch.Tensor
    bias: torch.Tensor | None

    def masked(self, scoring: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the gating is given."""
        bias = None if self.bias is None else mask_bias(self.bias, self.banned)
        return mask_logits(self.logits, self.banned[None], scoring), bias


def hostile_cases(spec: GatingSpec, has_bias: bool, dtype: torch.dtype, device: torch.device) -> Iterator[Hostile]:
    """Logits and biases that tell a safe gating from an unsafe one."""
    generator = torch.Generator().manual_seed(_SEED)
    for bans, banned in _bans(spec, generator):
        kinds, logits = _logits(banned, dtype, generator)
        for bias_name, bias in _biases(banned, generator) if has_bias else (("no bias", None),):
            on_device = None if bias is None else bias.to(device)
            yield Hostile(f"{bans}, {bias_name}", kinds, logits.to(device), banned.to(device), on_device)


def _bans(spec: GatingSpec, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    num_experts, top_k = spec.num_experts, spec.top_k
    expert = torch.arange(num_experts)
    in_groups = expert.unflatten(0, (spec.num_expert_group, -1))
    sets = {
        "the first expert banned": expert == 0,
        "all but the last top_k banned": expert < num_experts - top_k,
        "all but the first top_k banned": expert >= top_k,
        "half of the experts banned": torch.randperm(num_experts, generator=generator) % 2 == 0,
        "all but one expert of a group banned": torch.isin(expert, in_groups[0, 1:]),
        "whole groups banned": torch.isin(expert, in_groups[: spec.num_expert_group - spec.topk_group]),
    }
    for name, banned in sets.items():
        if banned.any() and (~banned).sum() >= top_k and groups_suffice(banned, spec):
            yield name, banned


def _logits(banned: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[str, ...], torch.Tensor]:
    num_experts, largest = len(banned), torch.finfo(dtype).max
    first = int((~banned).nonzero()[0])

    def tokens(allowed: float | torch.Tensor, others: float | torch.Tensor) -> torch.Tensor:
        return torch.where(banned, torch.as_tensor(others), torch.as_tensor(allowed)).float().expand(num_experts)

    def one(value: float, rest: torch.Tensor) -> torch.Tensor:
        return rest.clone().index_fill_(0, torch.tensor([first]), value)

    usual = torch.randn(num_experts, generator=generator) * 2
    kinds = {
        "usual logits": usual,
        "banned experts far ahead": tokens(usual, 50.0),
        "all logits equal": tokens(0.0, 0.0),
        "probabilities that underflow": one(0.0, tokens(-200.0, -150.0)),
        "16-bit probabilities that underflow": one(0.0, tokens(-30.0, 5.0)),
        "very low logits": tokens(-1e5, 0.0),
        "huge logits": one(largest, tokens(usual, largest)),
        "lowest logits": tokens(-largest, largest),
        "infinite logits": one(torch.inf, tokens(-torch.inf, torch.inf)),
        "NaN among the allowed": one(torch.nan, usual),
        "NaN among the banned": tokens(usual, torch.nan),
        "NaN everywhere": tokens(torch.nan, torch.nan),
    }
    return tuple(kinds), torch.stack(list(kinds.values())).clamp(-largest, largest).to(dtype)


def _biases(banned: torch.Tensor, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    usual = torch.randn(len(banned), generator=generator) / 5
    yield "a usual bias", usual
    yield "a bias that lifts the banned", torch.where(banned, 1e4, usual)
    yield "a bias that lowers the allowed", torch.where(banned, usual, -1e4)


def probe(native: Native, spec: GatingSpec, has_bias: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Ask a gating for the experts of hostile logits.

    Args:
        native: the gating.
        spec: what it is believed to be.
        has_bias: whether it takes a correction bias.
        device: where it runs.
        dtype: of its router logits.

    Returns:
        The first failure, or None: no banned expert came out.

    """
    for case in hostile_cases(spec, has_bias, dtype, device):
        weights, ids = native(*case.masked(spec.scoring))
        for kind, token_ids, token_weights in zip(case.kinds, ids.long().cpu(), weights.float().cpu(), strict=True):
            fault = _fault(token_ids, token_weights, case.banned.cpu())
            if fault is not None:
                return f"{kind}, {case.name}: {fault}"
    return None


def probe_outputs(
    forward: Forward,
    poison: Callable[[torch.Tensor], bool],
    spec: GatingSpec,
    has_bias: bool,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Ask a kernel that routes inside itself: nothing may change in its output when the weights of banned experts do.

    Args:
        forward: the kernel, at fixed hidden states.
        poison: changes the weights of banned experts, bool [num_experts], or changes them back; returns whether there are any here.
        spec: how it is believed to gate.
        has_bias: whether it takes a correction bias.
        device: where it runs.
        dtype: of its router logits.

    Returns:
        The first failure, or None: no banned expert had part in any output.

    """
    is_seen = False
    for case in hostile_cases(spec, has_bias, dtype, device):
        masked = case.masked(spec.scoring)
        # Banned experts at work, to see that poison is seen at all.
        control = torch.where(case.banned, 20.0, -20.0).to(dtype).expand_as(case.logits).contiguous()
        no_bias = None if case.bias is None else torch.zeros_like(case.bias)
        output, at_work = forward(*masked), forward(control, no_bias)
        if not _same(output, forward(*masked)).all():
            return f"{case.name}: its output is not repeatable, so nothing can be said"
        is_here = poison(case.banned)
        try:
            poisoned, seen = forward(*masked), forward(control, no_bias)
        finally:
            poison(case.banned)
        for kind, is_same in zip(case.kinds, _same(output, poisoned).tolist(), strict=True):
            if not is_same:
                return f"{kind}, {case.name}: a banned expert has part in its output"
        is_seen = is_seen or (is_here and not _same(at_work, seen).all())
    return None if is_seen else "its experts' weights cannot be found, so nothing can be said"


def _same(output: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """bool [num_tokens]: equal to the bit, or NaN in both."""
    return ((output == other) | (output.isnan() & other.isnan())).all(1)


def _fault(ids: torch.Tensor, weights: torch.Tensor, banned: torch.Tensor) -> str | None:
    chosen = ids.tolist()
    if len(set(chosen)) < len(chosen) or min(chosen) < 0 or max(chosen) >= len(banned):
        return f"it selects {chosen}"
    if banned[ids].any():
        return f"it selects the banned expert {int(ids[banned[ids]][0])}"
    if not weights.isfinite().all():
        return f"its weights are {weights.tolist()}"
    return None
