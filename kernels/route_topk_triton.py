"""The Triton kernel of `route_topk`; `reference.py` is its specification.

A program is one warp. It gates one token while tokens are few, which is fastest for each; where they are many it gates several,
because starting a program costs a GPU more than gating a token. Scores are compared as order-preserving int32 keys: an integer
maximum over a warp is one instruction on NVIDIA GPUs. A selection is two of these: the largest key, then the smallest expert that
has it, so equal scores go to the smaller id. Where the logits themselves are compared and have 16 bits, the key has room for the
expert, and one is enough. The loop over k finds ids only; the chosen logits are read once more and scored together. What a model
or a call does not use is compiled away; what none of a program's tokens needs is skipped.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from .spec import (
    FLAG_EXPLICIT_WEIGHTS,
    FLAG_FORCED,
    FLAG_NATIVE_WEIGHTS,
    FLAG_SCORE_BIAS,
    FLAG_STEERED,
    STEERING_MARGIN,
    GatingSpec,
    RouteRows,
    RouteWatch,
)

_FORCED = tl.constexpr(FLAG_FORCED)
_EXPLICIT_WEIGHTS = tl.constexpr(FLAG_EXPLICIT_WEIGHTS)
_NATIVE_WEIGHTS = tl.constexpr(FLAG_NATIVE_WEIGHTS)
_SCORE_BIAS = tl.constexpr(FLAG_SCORE_BIAS)
_STEERED = tl.constexpr(FLAG_STEERED)
_MARGIN = tl.constexpr(STEERING_MARGIN)
_LOWEST_KEY = tl.constexpr(-(1 << 31))
_NO_INDEX = tl.constexpr((1 << 31) - 1)
# Keys of finite floats end below all of these: of promoted experts, of wanted ones, and of those that only demoted ones come after.
_PROMOTED = tl.constexpr((1 << 31) - 1)
_WANTED = tl.constexpr((1 << 31) - (1 << 14))
_NOT_DEMOTED = tl.constexpr((1 << 31) - (1 << 15))
# float32 forms of bfloat16 and float16 end in as many zeros, which is room for an expert id.
_INDEX_MASK = tl.constexpr((1 << 13) - 1)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _finite(x):
    """Clamp to the finite float32 range; NaN becomes the lowest, because a maximum with one NaN operand is the other."""
    return tl.minimum(tl.maximum(x, -_LARGEST), _LARGEST)


@triton.jit
def _ordered_key(x):
    """int32 keys that sort as the finite floats `x` do, all above _LOWEST_KEY; both zeros are one key, as -0.0 + 0.0 is 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _float_of_key(key):
    """Inverse of `_ordered_key`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _column(values, BLOCK_TOKENS: tl.constexpr):
    """One value per token, to go with [tokens, n]. A single token's is a scalar, which has no layout to be converted."""
    if BLOCK_TOKENS == 1:
        return tl.max(values, axis=0)
    else:  # without it Triton compiles both returns
        return values[:, None]


@triton.jit
def _softmax_sums(x, among, BLOCK_TOKENS: tl.constexpr):
    """Per token, the largest logit of the lanes in `among` and the sum of exponentials relative to it; NaN and 0 if none are."""
    top = _float_of_key(tl.max(tl.where(among, _ordered_key(x), _LOWEST_KEY), axis=1))
    return top, tl.sum(tl.where(among, tl.exp(x - _column(top, BLOCK_TOKENS)), 0.0), axis=1)


@triton.jit
def _score(x, top, total, SCORING: tl.constexpr, BLOCK_TOKENS: tl.constexpr):
    """Scores of finite logits [tokens, n]; a softmax whose sums [tokens] are known."""
    if SCORING == "softmax":
        return tl.exp(x - _column(top, BLOCK_TOKENS)) / _column(total, BLOCK_TOKENS)
    # exp of -|x| never overflows
    small = tl.exp(-tl.abs(x))
    if SCORING == "sigmoid":
        return tl.where(x >= 0, 1.0, small) / (1.0 + small)
    # log(1 + z) loses digits for small z, where its series is exact enough
    series = small * (1.0 - small * (0.5 - small * (0.3333333333 - small * (0.25 - small * 0.2))))
    return tl.sqrt(tl.maximum(x, 0.0) + tl.where(small < 0.03, series, tl.log(1.0 + small)))


@triton.jit
def _packed_key(x, expert):
    """Keys of 16-bit floats, no two alike: among equals the smaller id is the larger key. Clamped infinities keep their places."""
    return (_ordered_key(x) & ~_INDEX_MASK) | (_INDEX_MASK - expert)


@triton.jit
def _best(key, index):
    """Per token, the smallest index among the largest keys, and that key. Two integer reductions: each is one REDUX on NVIDIA."""
    best = tl.max(key, axis=1)
    return tl.min(tl.where(key == best[:, None], index, _NO_INDEX), axis=1), best


@triton.jit
def _in_best_groups(key, BLOCK_GROUPS: tl.constexpr, BLOCK_SIZE: tl.constexpr, TOPK_GROUP: tl.constexpr, TOP2: tl.constexpr):
    """Lanes of one token's best groups; a group counts by its allowed experts only, and one without any comes last."""
    keys = tl.reshape(key, [BLOCK_GROUPS, BLOCK_SIZE])
    left = tl.max(keys, axis=1)
    if TOP2:
        first, best = _best(keys, tl.arange(0, BLOCK_SIZE)[None, :])
        second = tl.max(tl.where(tl.arange(0, BLOCK_SIZE)[None, :] == first[:, None], _LOWEST_KEY, keys), axis=1)
        score = _float_of_key(best) + tl.where(second == _LOWEST_KEY, 0.0, _float_of_key(second))
        left = tl.where(best == _LOWEST_KEY, best, _ordered_key(score))
    group = tl.arange(0, BLOCK_GROUPS)
    chosen = group < 0
    for _ in tl.static_range(TOPK_GROUP):
        pick = tl.min(tl.where(left == tl.max(left, axis=0), group, _NO_INDEX), axis=0)
        chosen |= group == pick
        left = tl.where(group == pick, _LOWEST_KEY, left)
    return tl.reshape(tl.broadcast_to(chosen[:, None], [BLOCK_GROUPS, BLOCK_SIZE]), [1, BLOCK_GROUPS * BLOCK_SIZE])


@triton.jit
def _prefer(key, inside, expert, FIRST: tl.constexpr, TOP_K: tl.constexpr):
    """Keys in which the lanes in `inside`, fewer than TOP_K, beat all others; each keeps its order. The best one gets FIRST."""
    left = tl.where(inside, key, _LOWEST_KEY)
    for k in range(TOP_K):
        pick, best = _best(left, expert)
        is_pick = (expert == pick[:, None]) & (best != _LOWEST_KEY)[:, None]
        key = tl.where(is_pick, FIRST - k, key)
        left = tl.where(is_pick, _LOWEST_KEY, left)
    return key


@triton.jit
def _select(
    x,
    allowed,
    promoted,
    demoted,
    expert,
    offs_k,
    correction_bias,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAY_RUN_OUT: tl.constexpr,
    PACKED_KEYS: tl.constexpr,
):
    """The best allowed experts, how many of them are real (the rest repeat the best), and the softmax's sums over those allowed.

    `promoted` and `demoted` are lanes of allowed experts, or None.
    """
    top = tl.zeros([BLOCK_TOKENS], tl.float32)
    total = top + 1.0
    if SCORING == "softmax":
        top, total = _softmax_sums(x, allowed, BLOCK_TOKENS)
    if SCORING == "softmax" and correction_bias is None:
        choice = x
    else:
        choice = _score(x, top, total, SCORING, BLOCK_TOKENS)
    if correction_bias is not None:
        choice += correction_bias
    if PACKED_KEYS:
        key = tl.where(allowed, _packed_key(choice, expert), _LOWEST_KEY)
    else:
        key = tl.where(allowed, _ordered_key(choice), _LOWEST_KEY)
    if TOPK_GROUP < NUM_GROUPS or demoted is not None:
        wanted = allowed
        if demoted is not None:
            wanted = wanted & (demoted == 0)
        others = wanted
        if TOPK_GROUP < NUM_GROUPS:
            of_others = key
            if demoted is not None:
                of_others = tl.where(others, key, _LOWEST_KEY)
            wanted = others & _in_best_groups(of_others, BLOCK_GROUPS, BLOCK_SIZE, TOPK_GROUP, GROUP_TOP2)
        candidates = tl.where(wanted, key, _LOWEST_KEY)
        if MAY_RUN_OUT:
            too_few = tl.sum(wanted.to(tl.int32), axis=1) < TOP_K
            if tl.max(too_few.to(tl.int32), axis=0) > 0:
                # Experts outside the best groups serve only once those have none left, and demoted ones after these.
                if demoted is not None and TOPK_GROUP < NUM_GROUPS:
                    key = _prefer(key, others, expert, _NOT_DEMOTED, TOP_K)
                candidates = tl.where(too_few[:, None], _prefer(key, wanted, expert, _WANTED, TOP_K), candidates)
        key = candidates
    if promoted is not None:
        key = tl.where(promoted, _PROMOTED - expert, key)
    ids = tl.zeros([BLOCK_TOKENS, offs_k.shape[1]], tl.int32)
    for k in tl.static_range(TOP_K):
        if PACKED_KEYS:
            best = tl.max(key, axis=1)
            pick = best
            key = tl.where(key == best[:, None], _LOWEST_KEY, key)
        else:
            pick, best = _best(key, expert)
            key = tl.where(expert == pick[:, None], _LOWEST_KEY, key)
        ids = tl.where(offs_k == k, _column(pick, BLOCK_TOKENS), ids)
    if PACKED_KEYS:
        ids = _INDEX_MASK - (ids & _INDEX_MASK)
    num_left = tl.full([BLOCK_TOKENS], TOP_K, tl.int32)
    if MAY_RUN_OUT:
        ran_out = best == _LOWEST_KEY
        if tl.max(ran_out.to(tl.int32), axis=0) > 0:
            num_left = tl.where(ran_out, tl.sum(allowed.to(tl.int32), axis=1), num_left)
            left = _column(num_left, BLOCK_TOKENS)
            first = tl.sum(tl.where((offs_k == 0) & (left > 0), ids, 0), axis=1)
            ids = tl.where(offs_k < left, ids, _column(first, BLOCK_TOKENS))
    return ids, num_left, top, total


@triton.jit
def _weigh(
    chosen, is_real, top, total, scaling_factor, SCORING: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_TOKENS: tl.constexpr
):
    """Weights of the chosen logits [tokens, k]; 0 outside `is_real`."""
    weights = tl.where(is_real, _score(chosen, top, total, SCORING, BLOCK_TOKENS), 0.0)
    if RENORMALIZE:
        sum_of_weights = _column(tl.sum(weights, axis=1), BLOCK_TOKENS)
        weights = tl.where(sum_of_weights > 0, weights / sum_of_weights, 0.0)
    return weights * scaling_factor


@triton.jit
def _bits(words_at, expert, mask):
    """Whether an expert's bit is set in words [num_words] of each token; False outside `mask`."""
    # The word's sign bit is expert 31 of its 32: an arithmetic shift keeps it, the mask takes the one bit.
    words = tl.load(words_at + expert // 32, mask=mask, other=0)
    return ((words >> (expert % 32)) & 1) != 0


@triton.jit
def _gate(
    x,
    logits_at,
    expert,
    is_expert,
    is_token,
    offs_k,
    row,
    flags_ptr,
    allowed_ptr,
    forced_ids_ptr,
    forced_weights_ptr,
    score_bias_ptr,
    steered_ptr,
    correction_bias,
    scaling_factor,
    HAS_ROWS: tl.constexpr,
    IS_SOFT: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    PACKED_KEYS: tl.constexpr,
):
    """Ids and weights [tokens, k] of one program's tokens; without HAS_ROWS none has a directive, without IS_SOFT a soft one."""
    mask_k = offs_k < TOP_K
    allowed = is_expert & (row == row)[:, None]
    biased = x
    promoted = None
    demoted = None
    flags = tl.zeros([BLOCK_TOKENS], tl.int32)
    if HAS_ROWS:
        NUM_WORDS: tl.constexpr = (NUM_EXPERTS + 31) // 32
        # Row 0 always exists, so loads need no mask; a token without a directive ignores what they bring.
        at = tl.maximum(row, 0).to(tl.int64)
        flags = tl.where(row >= 0, tl.load(flags_ptr + at), 0)
        # The word's sign bit is expert 31 of its 32: an arithmetic shift keeps it, the mask takes the one bit.
        words = tl.load(allowed_ptr + at[:, None] * NUM_WORDS + expert // 32, mask=is_expert, other=0)
        words = tl.where((row < 0)[:, None], -1, words)
        allowed = allowed & (((words >> (expert % 32)) & 1) != 0)
        if IS_SOFT:
            wants_bias = ((flags & _SCORE_BIAS) != 0)[:, None]
            score_bias = tl.load(score_bias_ptr + at[:, None] * NUM_EXPERTS + expert, mask=is_expert & wants_bias, other=0.0)
            biased = tl.where(wants_bias, _finite(x + score_bias), x)
            is_steered = (flags & (_STEERED | _FORCED)) == _STEERED
            steered_at = steered_ptr + at[:, None] * (2 * NUM_WORDS)
            promoted = _bits(steered_at, expert, allowed & is_steered[:, None])
            demoted = _bits(steered_at + NUM_WORDS, expert, allowed & is_steered[:, None]) & (promoted == 0)
    forced = (flags & _FORCED) != 0
    native = (flags & _NATIVE_WEIGHTS) != 0

    MAY_RUN_OUT: tl.constexpr = HAS_ROWS or TOPK_GROUP * (NUM_EXPERTS // NUM_GROUPS) < TOP_K
    top = tl.zeros([BLOCK_TOKENS], tl.float32)
    total = top + 1.0
    num_left = tl.full([BLOCK_TOKENS], TOP_K, tl.int32)
    ids = tl.zeros([BLOCK_TOKENS, offs_k.shape[1]], tl.int32)
    if tl.min(forced.to(tl.int32), axis=0) == 0:
        ids, num_left, top, total = _select(
            biased,
            allowed,
            promoted,
            demoted,
            expert,
            offs_k,
            correction_bias,
            TOP_K,
            SCORING,
            NUM_GROUPS,
            TOPK_GROUP,
            GROUP_TOP2,
            BLOCK_TOKENS,
            BLOCK_GROUPS,
            BLOCK_SIZE,
            MAY_RUN_OUT,
            PACKED_KEYS,
        )
    if HAS_ROWS:
        forced_ids = tl.load(forced_ids_ptr + at[:, None] * TOP_K + offs_k, mask=mask_k & forced[:, None], other=0)
        ids = tl.where(forced[:, None], forced_ids, ids)
        num_left = tl.where(forced, TOP_K, num_left)

    # The chosen logits once more, from the L1 cache: cheaper than one reduction per expert to bring them here.
    chosen = _finite(tl.load(logits_at + ids, mask=mask_k & is_token[:, None], other=0.0).to(tl.float32))
    if IS_SOFT:
        # Native weights are those of the logits as they were.
        biases = mask_k & wants_bias & (native == 0)[:, None]
        chosen_bias = tl.load(score_bias_ptr + at[:, None] * NUM_EXPERTS + ids, mask=biases, other=0.0)
        chosen = tl.where(biases, _finite(chosen + chosen_bias), chosen)
        weighs_steered = is_steered & (native == 0)
        if tl.max(weighs_steered.to(tl.int32), axis=0) > 0:
            key = _ordered_key(biased)
            high = _finite(_float_of_key(tl.max(tl.where(allowed, key, _LOWEST_KEY), axis=1)) + _MARGIN)[:, None]
            low = _finite(_float_of_key(tl.min(tl.where(allowed, key, _NO_INDEX), axis=1)) - _MARGIN)[:, None]
            if SCORING == "softmax":
                steered = tl.where(promoted, high, tl.where(demoted, low, biased))
                steered_top, steered_total = _softmax_sums(steered, allowed, BLOCK_TOKENS)
                top = tl.where(weighs_steered, steered_top, top)
                total = tl.where(weighs_steered, steered_total, total)
            of_chosen = mask_k & weighs_steered[:, None]
            is_promoted = _bits(steered_at, ids, of_chosen)
            is_demoted = _bits(steered_at + NUM_WORDS, ids, of_chosen)
            chosen = tl.where(is_promoted, high, tl.where(is_demoted, low, chosen))
    if SCORING == "softmax" and HAS_ROWS:
        if tl.max(native.to(tl.int32), axis=0) > 0:
            native_top, native_total = _softmax_sums(x, is_expert, BLOCK_TOKENS)
            top = tl.where(native, native_top, top)
            total = tl.where(native, native_total, total)
        weighs_chosen = forced & (native == 0)
        if tl.max(weighs_chosen.to(tl.int32), axis=0) > 0:
            chosen_top, chosen_total = _softmax_sums(chosen, mask_k, BLOCK_TOKENS)
            top = tl.where(weighs_chosen, chosen_top, top)
            total = tl.where(weighs_chosen, chosen_total, total)
    is_real = mask_k & (offs_k < _column(num_left, BLOCK_TOKENS))
    weights = _weigh(chosen, is_real, top, total, scaling_factor, SCORING, RENORMALIZE, BLOCK_TOKENS)
    if HAS_ROWS:
        explicit = (flags & _EXPLICIT_WEIGHTS) != 0
        if tl.max(explicit.to(tl.int32), axis=0) > 0:
            given = tl.load(forced_weights_ptr + at[:, None] * TOP_K + offs_k, mask=mask_k & explicit[:, None], other=0.0)
            weights = tl.where(explicit[:, None], given, weights)
    return ids, weights


# Only loads of whole rows gain from aligned pointers; every other specialisation would be one more compilation while serving.
@triton.jit(
    do_not_specialize=["num_tokens", "stride_weights", "stride_ids", "stride_native", "stride_routes"],
    do_not_specialize_on_alignment=[
        "row_index_ptr",
        "flags_ptr",
        "allowed_ptr",
        "forced_ids_ptr",
        "forced_weights_ptr",
        "steered_ptr",
        "is_padding_ptr",
        "topk_weights_ptr",
        "topk_ids_ptr",
        "native_ids_ptr",
        "routes_ids_ptr",
        "routes_weights_ptr",
        "watch_mark_ptr",
        "watch_num_nan_ptr",
    ],
)
def route_topk_kernel(
    logits_ptr,  # [num_tokens, NUM_EXPERTS]
    stride_logits,
    row_index_ptr,  # int32 [num_tokens]
    flags_ptr,  # int32 [num_rows]
    allowed_ptr,  # int32 [num_rows, NUM_WORDS]
    forced_ids_ptr,  # int32 [num_rows, TOP_K]
    forced_weights_ptr,  # float32 [num_rows, TOP_K]
    score_bias_ptr,  # float32 [num_rows, NUM_EXPERTS]
    steered_ptr,  # int32 [num_rows, 2, NUM_WORDS]
    correction_bias_ptr,  # float [NUM_EXPERTS]
    is_padding_ptr,  # bool [num_tokens]
    topk_weights_ptr,  # float32 [num_tokens, TOP_K]
    stride_weights,
    topk_ids_ptr,  # int [num_tokens, TOP_K]
    stride_ids,
    native_ids_ptr,  # int32 [num_tokens, TOP_K]
    stride_native,
    routes_ids_ptr,  # int32 [num_tokens, TOP_K]
    routes_weights_ptr,  # float32 [num_tokens, TOP_K]
    stride_routes,
    watch_step_ptr,  # int32 [2]
    watch_mark_ptr,  # int32 [1]
    watch_num_nan_ptr,  # int64 [1]
    routed_scaling_factor,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    GROUP_TOP2: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_SOFT: tl.constexpr,
    HAS_CORRECTION_BIAS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    HAS_NATIVE: tl.constexpr,
    HAS_ROUTES: tl.constexpr,
    HAS_WATCH: tl.constexpr,
    ONLY_DIRECTED: tl.constexpr,
    PACKED_KEYS: tl.constexpr,
    DENSE_LOGITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    is_token = token < num_tokens
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    mask_k = offs_k < TOP_K
    mask_out = mask_k & is_token[:, None]
    weights_at = topk_weights_ptr + token[:, None] * stride_weights + offs_k
    ids_at = topk_ids_ptr + token[:, None] * stride_ids + offs_k
    routes_at = token[:, None] * stride_routes + offs_k

    if HAS_WATCH:
        if tl.program_id(0) == 0:
            tl.store(watch_mark_ptr, tl.load(watch_step_ptr))
    row = tl.full([BLOCK_TOKENS], -1, tl.int32)
    if HAS_ROWS:
        row = tl.load(row_index_ptr + token, mask=is_token, other=-1)
    if HAS_NATIVE or (ONLY_DIRECTED and HAS_ROUTES):
        native_ids = tl.load(ids_at, mask=mask_out, other=0).to(tl.int32)
    if HAS_NATIVE:
        tl.store(native_ids_ptr + token[:, None] * stride_native + offs_k, native_ids, mask=mask_out)
    if ONLY_DIRECTED:
        directed = row >= 0
        if HAS_ROUTES:
            left_alone = mask_out & (row < 0)[:, None]
            native_weights = tl.load(weights_at, mask=left_alone, other=0.0)
            tl.store(routes_ids_ptr + routes_at, native_ids, mask=left_alone)
            tl.store(routes_weights_ptr + routes_at, native_weights, mask=left_alone)
        if tl.max(row, axis=0) < 0:
            return
        mask_out = mask_out & directed[:, None]

    lane = tl.arange(0, BLOCK_GROUPS * BLOCK_SIZE)[None, :]
    if NUM_GROUPS > 1:
        # A group fills a power of two of lanes, so that it can be reduced on its own.
        GROUP_SIZE: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
        expert = lane // BLOCK_SIZE * GROUP_SIZE + lane % BLOCK_SIZE
        is_expert = (lane % BLOCK_SIZE < GROUP_SIZE) & (lane // BLOCK_SIZE < NUM_GROUPS)
    else:
        expert = lane
        is_expert = lane < NUM_EXPERTS
    # A row's length is known when the kernel is compiled, and how aligned rows are; a stride is not.
    logits_at = logits_ptr + token[:, None] * (NUM_EXPERTS if DENSE_LOGITS else stride_logits)
    mask_lane = is_expert & is_token[:, None]
    logits = tl.load(logits_at + expert, mask=mask_lane, other=0.0).to(tl.float32)
    if HAS_WATCH:
        is_counted = token < tl.load(watch_step_ptr + 1)
        if ONLY_DIRECTED:
            is_counted = is_counted & directed
        num_nan = tl.sum(tl.where(is_counted, tl.max((logits != logits).to(tl.int32), axis=1), 0), axis=0)
        if num_nan > 0:
            tl.atomic_add(watch_num_nan_ptr, num_nan.to(tl.int64))
    x = _finite(logits)
    correction_bias = None
    if HAS_CORRECTION_BIAS:
        correction_bias = tl.load(correction_bias_ptr + expert, mask=is_expert, other=0.0).to(tl.float32)
    ids = tl.zeros([BLOCK_TOKENS, BLOCK_K], tl.int32)
    weights = tl.zeros([BLOCK_TOKENS, BLOCK_K], tl.float32)
    is_soft = False
    if HAS_SOFT:
        flags = tl.load(flags_ptr + row, mask=row >= 0, other=0)
        is_soft = tl.max(flags & (_SCORE_BIAS | _STEERED), axis=0) > 0
    # A program none of whose tokens has a directive takes a way of its own, which has nothing of the table in it; so does one with
    # a soft directive, which has more in it, and whose logits are no longer the model's.
    if HAS_SOFT and is_soft:
        ids, weights = _gate(
            x,
            logits_at,
            expert,
            is_expert,
            is_token,
            offs_k,
            row,
            flags_ptr,
            allowed_ptr,
            forced_ids_ptr,
            forced_weights_ptr,
            score_bias_ptr,
            steered_ptr,
            correction_bias,
            routed_scaling_factor,
            True,
            True,
            NUM_EXPERTS,
            TOP_K,
            BLOCK_TOKENS,
            BLOCK_GROUPS,
            BLOCK_SIZE,
            SCORING,
            RENORMALIZE,
            NUM_GROUPS,
            TOPK_GROUP,
            GROUP_TOP2,
            False,
        )
    elif HAS_ROWS and (ONLY_DIRECTED or tl.max(row, axis=0) >= 0):
        ids, weights = _gate(
            x,
            logits_at,
            expert,
            is_expert,
            is_token,
            offs_k,
            row,
            flags_ptr,
            allowed_ptr,
            forced_ids_ptr,
            forced_weights_ptr,
            score_bias_ptr,
            steered_ptr,
            correction_bias,
            routed_scaling_factor,
            True,
            False,
            NUM_EXPERTS,
            TOP_K,
            BLOCK_TOKENS,
            BLOCK_GROUPS,
            BLOCK_SIZE,
            SCORING,
            RENORMALIZE,
            NUM_GROUPS,
            TOPK_GROUP,
            GROUP_TOP2,
            PACKED_KEYS,
        )
    else:
        ids, weights = _gate(
            x,
            logits_at,
            expert,
            is_expert,
            is_token,
            offs_k,
            row,
            flags_ptr,
            allowed_ptr,
            forced_ids_ptr,
            forced_weights_ptr,
            score_bias_ptr,
            steered_ptr,
            correction_bias,
            routed_scaling_factor,
            False,
            False,
            NUM_EXPERTS,
            TOP_K,
            BLOCK_TOKENS,
            BLOCK_GROUPS,
            BLOCK_SIZE,
            SCORING,
            RENORMALIZE,
            NUM_GROUPS,
            TOPK_GROUP,
            GROUP_TOP2,
            PACKED_KEYS,
        )
    if HAS_PADDING:
        padding = tl.load(is_padding_ptr + token, mask=is_token, other=0).to(tl.int1)[:, None]
        ids = tl.where(padding, -1, ids)
        weights = tl.where(padding, 0.0, weights)
    tl.store(weights_at, weights, mask=mask_out)
    tl.store(ids_at, ids.to(topk_ids_ptr.dtype.element_ty), mask=mask_out)
    if HAS_ROUTES:
        tl.store(routes_ids_ptr + routes_at, ids, mask=mask_out)
        tl.store(routes_weights_ptr + routes_at, weights, mask=mask_out)


@cache
def constants(spec: GatingSpec) -> dict[str, object]:
    """The compile-time constants that follow from a model's gating."""
    num_groups = spec.num_expert_group if spec.grouped else 1
    return {
        "NUM_EXPERTS": spec.num_experts,
        "TOP_K": spec.top_k,
        "BLOCK_GROUPS": triton.next_power_of_2(num_groups),
        "BLOCK_SIZE": triton.next_power_of_2(spec.num_experts // num_groups),
        "BLOCK_K": triton.next_power_of_2(spec.top_k),
        "SCORING": spec.scoring,
        "RENORMALIZE": spec.renormalize,
        "NUM_GROUPS": num_groups,
        "TOPK_GROUP": spec.topk_group,
        "GROUP_TOP2": spec.group_score == "top2",
    }


def tokens_per_program(spec: GatingSpec, num_tokens: int) -> int:
    """Tokens that one program gates; docs/kernels.md has the measurements behind it."""
    lanes = triton.next_power_of_2(spec.num_experts)
    if spec.grouped or num_tokens <= 32 * lanes:
        return 1
    return max(1, min(32, 256 // lanes))


def _has_packed_keys(dtype: torch.dtype, spec: GatingSpec, biased: bool) -> bool:
    """Whether what is compared are the logits themselves, and they have 16 bits."""
    return (
        dtype.itemsize == 2
        and spec.scoring == "softmax"
        and not biased
        and not spec.grouped
        and spec.num_experts <= _INDEX_MASK.value + 1
    )


def launch_arguments(
    router_logits: torch.Tensor,
    row_index: torch.Tensor | None,
    rows: RouteRows | None,
    spec: GatingSpec,
    correction_bias: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    native_ids: torch.Tensor | None,
    routes_ids: torch.Tensor | None,
    routes_weights: torch.Tensor | None,
    watch: RouteWatch | None,
    only_directed: bool,
) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:
    """Grid, positional and keyword arguments of the launch; tensors without memory serve for compilation alone."""
    num_tokens = router_logits.shape[0]
    block_tokens = tokens_per_program(spec, num_tokens)
    flags, allowed, forced_ids, forced_weights, score_bias, steered = rows if rows is not None else (None,) * 6
    positional = (
        router_logits,
        router_logits.stride(0),
        row_index,
        flags,
        allowed,
        forced_ids,
        forced_weights,
        score_bias,
        steered,
        correction_bias,
        is_padding,
        topk_weights,
        topk_weights.stride(0),
        topk_ids,
        topk_ids.stride(0),
        native_ids,
        native_ids.stride(0) if native_ids is not None else 0,
        routes_ids,
        routes_weights,
        routes_ids.stride(0) if routes_ids is not None else 0,
        *(watch or (None,) * 3),
        float(spec.routed_scaling_factor),
        num_tokens,
    )
    keywords = {
        "HAS_ROWS": rows is not None,
        "HAS_SOFT": steered is not None,
        "HAS_CORRECTION_BIAS": correction_bias is not None,
        "HAS_PADDING": is_padding is not None,
        "HAS_NATIVE": native_ids is not None,
        "HAS_ROUTES": routes_ids is not None,
        "HAS_WATCH": watch is not None,
        "ONLY_DIRECTED": only_directed,
        "PACKED_KEYS": _has_packed_keys(router_logits.dtype, spec, correction_bias is not None),
        "DENSE_LOGITS": router_logits.stride(0) == spec.num_experts,
        "BLOCK_TOKENS": block_tokens,
        "num_warps": 1,
        **constants(spec),
    }
    return (triton.cdiv(num_tokens, block_tokens),), positional, keywords


def launch(*arguments: Any) -> None:
    """Launch the kernel on checked arguments, as in `launch_arguments`; `route_topk` says what they mean."""
    grid, positional, keywords = launch_arguments(*arguments)
    route_topk_kernel[grid](*positional, **keywords)
