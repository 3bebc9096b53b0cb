"""Noise on router logits, so that a route which was found by search is not the route of the next request.

The contract, as a plain double loop over tokens `t` and experts `e` of one layer in one step:

    word = philox4x32_10(counter=(t * num_experts + e, layer, step % 2**32, step >> 32), key=(seed % 2**32, seed >> 32))[0]
    noise = scale * ((word >> 8) * 2**-23 - 1)           # uniform over [-scale, scale), in steps of scale * 2**-23
    out[t, e] = router_logits[t, e] + noise              # in float32, rounded to the logits' dtype; a forced token: unchanged

Philox is the generator of `tl.rand`. The step counts forward passes, so no two passes draw alike; ranks of a tensor-parallel group
run the same steps and draw alike. Noise of at most `scale` reorders two experts only where their logits are within 2 * scale.
"""

from __future__ import annotations

import torch

from .route_topk import uses_triton

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def jitter_logits(
    router_logits: torch.Tensor,
    step: torch.Tensor,
    forced: torch.Tensor | None,
    *,
    layer: int,
    seed: int,
    scale: float,
) -> torch.Tensor:
    """Router logits with noise; no host synchronisation on GPUs.

    Args:
        router_logits: [num_tokens, num_experts], float32, bfloat16 or float16; experts contiguous. Not changed.
        step: int64 [1], on the logits' device.
        forced: bool [num_tokens], tokens that keep their logits; None: none.
        layer: index of the layer, part of the counter.
        seed: 0 to 2**63 - 1, the generator's key.
        scale: largest change of a logit.

    Returns:
        A new tensor of the same shape and dtype.

    """
    if uses_triton(router_logits.device):
        from .jitter_triton import launch

        return launch(router_logits, step, forced, layer, seed, scale)
    return jitter_logits_reference(router_logits, step, forced, layer=layer, seed=seed, scale=scale)


def jitter_logits_reference(
    router_logits: torch.Tensor,
    step: torch.Tensor,
    forced: torch.Tensor | None,
    *,
    layer: int,
    seed: int,
    scale: float,
) -> torch.Tensor:
    """The same in torch; what CPU engines run."""
    num_tokens, num_experts = router_logits.shape
    now = int(step)
    offset = torch.arange(num_tokens * num_experts, dtype=torch.int64, device=router_logits.device)
    word = philox(offset, layer, now & _MASK, now >> 32, seed)
    noise = ((word >> 8).to(torch.float32) * 2.0**-23 - 1.0) * scale
    jittered = (router_logits.to(torch.float32) + noise.view(num_tokens, num_experts)).to(router_logits.dtype)
    return jittered if forced is None else torch.where(forced.unsqueeze(1), router_logits, jittered)


def philox(counter: torch.Tensor, layer: int, step_low: int, step_high: int, seed: int) -> torch.Tensor:
    """First word of Philox 4x32 with 10 rounds, as int64; products wrap to their low 64 bits, of which both halves are used."""
    c0, c1, c2, c3 = counter, *(torch.full_like(counter, word) for word in (layer, step_low, step_high))
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        from_c0, from_c2 = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c2 = ((from_c2 >> 32) & _MASK) ^ c1 ^ k0, ((from_c0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = from_c2 & _MASK, from_c0 & _MASK
        k0, k1 = (k0 + _KEY_A) & _MASK, (k1 + _KEY_B) & _MASK
    return c0
