"""Some layers of the loaded model, run on batches that the scheduler knows nothing of.

The model's own `forward` runs, as a pipeline rank that holds layers `start` to `end`: vLLM's models take the residual stream in and
hand it out there (`IntermediateTensors`), so no layer is called from here and every family that can be split over pipeline ranks
can be entered at any layer. Attention is vLLM's own, on the paged KV cache, with metadata from the runner's own builders.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from vllm.distributed import parallel_state
from vllm.forward_context import get_forward_context, set_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.models.utils import extract_layer_index
from vllm.sequence import IntermediateTensors
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata, build_slot_mappings_by_layer

from ..errors import RouteError
from .device_table import upload

# Backends that cannot read a cached prefix in a prefill: every token goes as a sequence of its own, which is a decode.
_DECODE_ONLY = ("CPU_MLA",)
# Block tables are as wide as some latent kernels want them: a multiple of this many tokens.
_TABLE_TOKENS = 128
# With more scored tokens than this share, gathering them costs more than it saves.
_FEW = 0.9


class _Rank:
    """The pipeline group as a rank in the middle sees it; everything else is the real group's."""

    def __init__(self, group: Any, is_first_rank: bool, is_last_rank: bool) -> None:
        self._group = group
        self.is_first_rank = is_first_rank
        self.is_last_rank = is_last_rank

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)


class Queries(NamedTuple):
    """What a batch computes, on the host.

    Attributes:
        lens: int [num_seqs], tokens of each sequence; those of one token, if not all, come first.
        seq_lens: int [num_seqs], tokens that each can see, its own included.
        block_table: int64 [KV cache groups, num_seqs, width], KV blocks of each.
        positions: int64 [num_tokens].
        slots: int64 [KV cache groups, num_tokens], where in the KV cache each token's K and V go.
        scored: bool [num_tokens], tokens whose output is wanted behind the last layer.

    """

    lens: np.ndarray
    seq_lens: np.ndarray
    block_table: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    scored: np.ndarray


class Batch(NamedTuple):
    """The same on the device, for any layers; `scored` are numbers of tokens, None: so many that the others may as well stay."""

    num_tokens: int
    positions: torch.Tensor
    scored: torch.Tensor | None
    metadata: dict[str, Any]
    slots: dict[str, torch.Tensor]


class LayerRange:
    """The model of one worker, to be run from any layer to any other.

    Args:
        runner: vLLM's model runner, KV cache included.
        vllm_config: the engine's config.

    Attributes:
        model: the loaded model.
        num_layers: its decoder layers.
        num_groups: of KV caches; layers of different groups may have one memory, so each has blocks of its own.
        block_size: tokens of a KV block.
        keys: names of the tensors that make up the residual stream.
        wanted: int64, tokens of the batch in hand whose output is wanted behind the last layer; None: all.

    Raises:
        RouteError: this model or this engine cannot be entered in the middle.

    """

    def __init__(self, runner: Any, vllm_config: Any) -> None:
        self._runner = runner
        self._vllm_config = vllm_config
        self.device: torch.device = runner.device
        self.model = runner.get_model()
        _check(runner, vllm_config)
        decoders = [module for module in self.model.modules() if hasattr(module, "start_layer") and hasattr(module, "end_layer")]
        if len(decoders) != 1 or not hasattr(self.model, "make_empty_intermediate_tensors"):
            raise RouteError(f"{type(self.model).__name__} has no layers that a pipeline rank could hold a part of")
        self._decoder: Any = decoders[0]
        self.num_layers = int(self._decoder.end_layer)
        empty = self.model.make_empty_intermediate_tensors(1, vllm_config.model_config.dtype, self.device)
        self._widths = {key: tuple(value.shape[1:]) for key, value in empty.items()}
        self.keys = tuple(self._widths)
        groups = runner.kv_cache_config.kv_cache_groups
        self.num_groups, self.block_size = len(groups), int(groups[0].kv_cache_spec.block_size)
        layers = vllm_config.compilation_config.static_forward_context
        # KV cache of each attention layer, with its group and the number of its decoder layer.
        self._caches = [
            (number, extract_layer_index(name), layers[name].kv_cache)
            for number, group in enumerate(groups)
            for name in group.layer_names
        ]
        self.wanted: torch.Tensor | None = None
        for module in self.model.modules():
            if isinstance(module, MoERunner) and int(module.layer_id) == self.num_layers - 1:
                _skip_unwanted(module, self)
        self._decode_only = any(item.backend.get_name() in _DECODE_ONLY for items in runner.attn_groups for item in items)

    def empty_stream(self, *sizes: int) -> dict[str, torch.Tensor]:
        """Room for the residual stream of tokens: each tensor is [*sizes, width]."""
        dtype = self._vllm_config.model_config.dtype
        return {key: torch.empty((*sizes, *width), dtype=dtype, device=self.device) for key, width in self._widths.items()}

    def table_width(self, num_tokens: int) -> int:
        """Columns of a block table for sequences of up to this many tokens."""
        return -(-num_tokens // _TABLE_TOKENS) * max(1, _TABLE_TOKENS // self.block_size)

    def copy_blocks(self, source: np.ndarray, target: np.ndarray, first_layer: np.ndarray) -> None:
        """Copy KV blocks, int64 [KV cache groups, num_blocks], each from a layer on, int [num_blocks] in ascending order."""
        from_ids, to_ids = (upload(ids, torch.int64, self.device) for ids in (source, target))
        for group, layer, cache in self._caches:
            count = int(np.searchsorted(first_layer, layer, "right"))
            if count:
                cache.index_copy_(0, to_ids[group, :count], cache.index_select(0, from_ids[group, :count]))

    def batch(self, queries: Queries) -> Batch:
        """Put a batch on the device and make its attention metadata."""
        if self._decode_only:
            sequence = np.repeat(np.arange(len(queries.lens)), queries.lens)
            one = np.ones_like(sequence)
            queries = queries._replace(lens=one, seq_lens=queries.positions + 1, block_table=queries.block_table.take(sequence, 1))
        num_seqs, num_tokens = len(queries.lens), len(queries.positions)
        starts = np.zeros(num_seqs + 1, np.int32)
        np.cumsum(queries.lens, out=starts[1:])
        positions = upload(queries.positions, torch.int64, self.device)
        slots = upload(queries.slots, torch.int64, self.device)
        metadata = build_attn_metadata(
            attn_groups=self._runner.attn_groups,
            num_reqs=num_seqs,
            num_tokens=num_tokens,
            query_start_loc_gpu=upload(starts, torch.int32, self.device),
            query_start_loc_cpu=torch.from_numpy(starts),
            max_query_len=int(queries.lens.max()),
            seq_lens=upload(queries.seq_lens, torch.int32, self.device),
            max_seq_len=int(queries.seq_lens.max()),
            block_tables=[upload(table, torch.int32, self.device) for table in queries.block_table],
            slot_mappings=slots,
            kv_cache_config=self._runner.kv_cache_config,
            seq_lens_cpu_upper_bound=torch.from_numpy(queries.seq_lens.astype(np.int32)),
            positions=positions,
            is_prefilling=torch.ones(num_seqs, dtype=torch.bool),
            req_idx=np.arange(num_seqs, dtype=np.int32),
        )
        scored = np.flatnonzero(queries.scored)
        few = upload(scored, torch.int64, self.device) if len(scored) < _FEW * num_tokens else None
        return Batch(num_tokens, positions, few, metadata, build_slot_mappings_by_layer(slots, self._runner.kv_cache_config))

    def run(
        self, start: int, end: int, batch: Batch, token_ids: torch.Tensor, stream: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Run layers `start` to `end` (exclusive).

        Args:
            start: first layer.
            end: one past the last layer.
            batch: the tokens.
            token_ids: int32 [num_tokens], read where `start` is 0.
            stream: the residual stream at layer `start`, each [num_tokens, width], otherwise; may be overwritten.

        Returns:
            The residual stream at layer `end`; behind the last layer one tensor, the output layer's input, right for `wanted`.

        """
        context = set_forward_context(
            batch.metadata, self._vllm_config, num_tokens=batch.num_tokens, slot_mapping=batch.slots, skip_compiled=True
        )
        with context, self._as_rank(start, end), self._wanting(batch.scored if end == self.num_layers else None):
            # Its counter of MoE layers begins at the first one, wherever this pass begins.
            get_forward_context().all_moe_layers = None
            found = self.model(
                input_ids=token_ids if start == 0 else None,
                positions=batch.positions,
                intermediate_tensors=None if start == 0 else IntermediateTensors(dict(stream)),
            )
        return {self.keys[0]: found} if end == self.num_layers else dict(found.tensors)

    @contextmanager
    def _wanting(self, wanted: torch.Tensor | None) -> Iterator[None]:
        self.wanted = wanted
        try:
            yield
        finally:
            self.wanted = None

    @contextmanager
    def _as_rank(self, start: int, end: int) -> Iterator[None]:
        decoder, group = self._decoder, parallel_state._PP
        held = decoder.start_layer, decoder.end_layer
        parallel_state._PP = _Rank(group, start == 0, end == self.num_layers)  # type: ignore[assignment]
        decoder.start_layer, decoder.end_layer = start, end
        try:
            yield
        finally:
            parallel_state._PP = group
            decoder.start_layer, decoder.end_layer = held


def _skip_unwanted(runner: Any, layers: LayerRange) -> None:
    """Let the last layer's experts see only the tokens that are scored; K and V of the others are all that is needed of them."""
    own: Callable[..., torch.Tensor] = runner.forward
    # The runner belongs to the model, and `layers` to whoever scores.
    reference = weakref.ref(layers)

    def forward(
        self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: torch.Tensor | None, **more: torch.Tensor | None
    ) -> torch.Tensor:
        layers = reference()
        wanted = None if layers is None else layers.wanted
        others = [value for value in (*args, *more.values()) if value is not None]
        if wanted is None or others:
            return own(hidden_states, router_logits, *args, **more)
        found = torch.zeros_like(hidden_states)
        return found.index_copy_(0, wanted, own(hidden_states.index_select(0, wanted), router_logits.index_select(0, wanted)))

    runner.forward = types.MethodType(forward, runner)


def _check(runner: Any, vllm_config: Any) -> None:
    """Refuse engines whose model cannot be run between two steps."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    groups = runner.kv_cache_config.kv_cache_groups
    reasons = (
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.data_parallel_size > 1, "data parallelism"),
        (parallel.use_sequence_parallel_moe, "sequence-parallel MoE"),
        (vllm_config.lora_config is not None, "LoRA"),
        (vllm_config.speculative_config is not None, "speculation"),
        (vllm_config.aux_output_config.enable_return_routed_experts, "vLLM's own capture of routes"),
        (model.uses_mrope, "multi-dimensional rotary positions"),
        (model.is_encoder_decoder or model.is_multimodal_model, "more than a decoder of text"),
        (len({group.kv_cache_spec.block_size for group in groups}) > 1, "KV blocks of several sizes"),
        (any(isinstance(group.kv_cache_spec, MambaSpec) for group in groups), "state that is no KV cache"),
        (any(item.kernel_block_size is not None for items in runner.attn_groups for item in items), "split KV blocks"),
    )
    for holds, what in reasons:
        if holds:
            raise RouteError(f"cells cannot be scored with {what}")
