"""Routed experts as other programs write them: routes out of a receipt, and into a plan.

| form | value | rows | layers |
|---|---|---|---|
| `vllm` | base64 of a .npy (offline the array); uint8 up to 256 experts, else uint16 | tokens - 1 | all; dense ones hold 0 |
| `sglang` | base64 of raw int32, flat | tokens - 1 | all; dense ones hold 0 |
| `dynamo` | {"data": base64, "shape", "dtype", "start"} | tokens - 1 | all; dense ones hold 0 |
| `prime-rl` | {"data": bytes, "shape", "dtype"}, uint8 | tokens; 0 from the last one on | all; dense ones hold 0 |
| `tunix` | int32 array | tokens; -1 where nothing is to be replayed | all; dense ones hold -1 |
| `tensorrt-llm` | int32 array | tokens - 1 | MoE layers |

The last token of a sequence is sampled and never fed back, so it has no route. A row that repeats an expert, or a token of nothing
but zeros, is padding or a dense layer and never a route: it is refused by name, unless the caller says how many tokens are valid.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import RouteError
from .shape import ModelShape

FORMS = ("vllm", "sglang", "dynamo", "prime-rl", "tunix", "tensorrt-llm")
_DTYPES = ("uint8", "uint16", "int16", "int32", "int64")

Routes = npt.NDArray[np.int32]


def write(ids: Routes, shape: ModelShape, form: str, start: int = 0) -> Any:
    """Routes in another program's form.

    Args:
        ids: int32 [num_tokens, num_moe_layers, top_k], from position `start` on; no row of -1 but for `tunix`.
        shape: the model's.
        form: of `FORMS`.
        start: position of the first row.

    Raises:
        RouteError: an unknown form, a token whose routes are not known, more experts than the form can name.

    """
    _check_form(form)
    unknown = np.flatnonzero((ids < 0).any(axis=(1, 2)))
    if len(unknown) and form != "tunix":
        raise RouteError(
            f"the routes of {len(unknown)} tokens are not known, the first at position {start + int(unknown[0])}: their KV came "
            "from the prefix cache; export from a later start, or send the request without reading the cache"
        )
    if form == "tensorrt-llm":
        return ids.astype(np.int32)
    rows = np.full((len(ids), shape.num_hidden_layers, shape.top_k), -1 if form == "tunix" else 0, np.int32)
    rows[:, list(shape.moe_layers)] = ids
    if form in ("prime-rl", "tunix"):
        rows = np.concatenate([rows, np.full_like(rows[:1], -1 if form == "tunix" else 0)])
    if form == "tunix":
        return rows
    if form == "sglang":
        return base64.b64encode(rows.astype("<i4").tobytes()).decode("ascii")
    narrow = rows.astype(np.uint8 if shape.num_experts <= 256 else np.uint16)
    if form == "vllm":
        file = io.BytesIO()
        np.save(file, narrow)
        return base64.b64encode(file.getvalue()).decode("ascii")
    if form == "prime-rl":
        if narrow.dtype != np.uint8:
            raise RouteError(f"prime-rl names experts in one byte, and the model has {shape.num_experts}")
        return {"data": narrow.tobytes(), "shape": list(narrow.shape), "dtype": "uint8"}
    data = base64.b64encode(narrow.astype(narrow.dtype.newbyteorder("<")).tobytes()).decode("ascii")
    return {"data": data, "shape": list(narrow.shape), "dtype": str(narrow.dtype), "start": start}


def read(value: Any, shape: ModelShape, form: str, *, num_tokens: int | None = None, start: int = 0) -> tuple[Routes, int]:
    """Routes out of another program's form.

    Args:
        value: as the program gives it.
        shape: the model's.
        form: of `FORMS`.
        num_tokens: how many leading tokens are valid; what follows is padding and left out. None: all are.
        start: position of the first row, where the form does not say it.

    Returns:
        int32 [num_tokens, num_moe_layers, top_k], a row of -1 where nothing is to be replayed; and the first row's position.

    Raises:
        RouteError: not the form, another model's shape, padding, an expert out of range; names token and layer.

    """
    _check_form(form)
    array = _array(value, shape, form)
    if isinstance(value, Mapping):
        start = int(value.get("start", start))
    if array.ndim != 3 or array.shape[2] != shape.top_k or array.shape[1] not in (shape.num_hidden_layers, len(shape.moe_layers)):
        raise RouteError(
            f"routed experts have shape {list(array.shape)}, expected [num_tokens, {shape.num_hidden_layers} layers or "
            f"{len(shape.moe_layers)} MoE layers, {shape.top_k}]"
        )
    if num_tokens is not None:
        if not 0 < num_tokens <= len(array):
            raise RouteError(f"num_tokens {num_tokens} is out of range for {len(array)} rows (1-{len(array)})")
        array = array[:num_tokens]
    ids = array if array.shape[1] == len(shape.moe_layers) else array[:, list(shape.moe_layers)]
    ids = np.ascontiguousarray(ids, np.int32)
    _check_rows(ids, shape, form, start, valid=num_tokens is not None)
    return ids, start


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise RouteError(f"form {form!r} is not one of {', '.join(FORMS)}")


def _array(value: Any, shape: ModelShape, form: str) -> npt.NDArray[Any]:
    """The numbers, in whatever axes they come."""
    if isinstance(value, np.ndarray) or (isinstance(value, list) and form in ("tunix", "tensorrt-llm")):
        array = np.asarray(value)
    elif isinstance(value, Mapping):
        array = _of_mapping(value)
    elif isinstance(value, str | bytes) and form == "vllm":
        try:
            array = np.load(io.BytesIO(_decoded(value)), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise RouteError(f"routed experts of vLLM are base64 of a .npy file: {error}") from None
    elif isinstance(value, str | bytes) and form == "sglang":
        array = _shaped(_decoded(value), "<i4", (-1, shape.num_hidden_layers, shape.top_k))
    else:
        raise RouteError(f"routed experts of {form} cannot be a {type(value).__name__}")
    if array.dtype.kind not in "iu":
        raise RouteError(f"routed experts must be integers, got {array.dtype}")
    return array


def _of_mapping(value: Mapping[str, Any]) -> npt.NDArray[Any]:
    try:
        data, axes, dtype = value["data"], tuple(int(axis) for axis in value["shape"]), str(value["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise RouteError(f"routed experts need data, shape and dtype: {type(error).__name__}: {error}") from None
    if dtype.removeprefix("torch.") not in _DTYPES:
        raise RouteError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    raw = _decoded(data) if isinstance(data, str) else bytes(data)
    return _shaped(raw, np.dtype(dtype.removeprefix("torch.")).newbyteorder("<"), axes)


def _decoded(text: str | bytes) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise RouteError(f"routed experts are not base64: {error}") from None


def _shaped(raw: bytes, dtype: Any, axes: tuple[int, ...]) -> npt.NDArray[Any]:
    try:
        return np.frombuffer(raw, dtype).reshape(axes)
    except ValueError:
        raise RouteError(f"routed experts of {len(raw)} bytes are not {np.dtype(dtype)} {list(axes)}") from None


def _check_rows(ids: Routes, shape: ModelShape, form: str, start: int, valid: bool) -> None:
    def fail(at: tuple[int, ...], what: str) -> None:
        token, slot = int(at[0]), int(at[1])
        row = ids[token, slot].tolist()
        raise RouteError(f"position {start + token}, layer {shape.moe_layers[slot]}: {row} {what}")

    for at in np.argwhere((ids >= shape.num_experts).any(-1))[:1]:
        fail(at, f"names an expert out of range for {shape.num_experts} experts (0-{shape.num_experts - 1})")
    empty = (ids == -1).all(-1)
    for at in np.argwhere((ids < 0).any(-1) & ~(empty & (form == "tunix")))[:1]:
        fail(at, "has a negative expert" + ("" if form == "tunix" else "; only tunix says so what is not to be replayed"))
    hint = "" if valid else "; say with num_tokens how many leading tokens are valid"
    ordered = np.sort(ids, -1)
    repeats = (ordered[..., 1:] == ordered[..., :-1]).any(-1) & ~empty
    for at in np.argwhere(repeats)[:1]:
        fail(at, f"repeats an expert: padding or a dense layer, never a route{hint}")
    # With one expert a token nothing repeats; a token of nothing but expert 0 may still be padding.
    if not valid and shape.top_k == 1 and len(shape.moe_layers) > 1:
        for token in np.flatnonzero((ids == 0).all(axis=(1, 2)))[:1]:
            fail((int(token), 0), f"and all other layers are 0: padding, or every layer picked expert 0{hint}")
