"""Compile the Triton kernels for GPUs that need not be there, and report what the compilers made of them.

    python benchmarks/compile_table.py --out docs/kernels.md     # rewrite the table between the marks
    python benchmarks/compile_table.py --check docs/kernels.md   # fail on spills or on a table with other rows

Arguments, constants and warps are those of the real launch: the launch code is asked for them with tensors that have a shape
but no memory, and Triton's own binder turns them into a signature. Registers, stack and shared memory come from the cubin
(cuobjdump) or the amdgcn metadata, instructions and load widths from the disassembly. Instructions are those of one warp; for the
route kernel with one token a program on CUDA, those on the shortest path that makes all top_k selections: with a table that of a
token without a directive, and under "only directed tokens" that of a masked one. Elsewhere it is all of them, whichever branch they
are on. Registers are per thread (VGPRs on AMD).
"""

from __future__ import annotations

import argparse
import functools
import heapq
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The interpreter replaces the compiler as soon as a kernel module is imported; fused arithmetic is today's default, and
# Triton warns as long as nobody says so.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from common import rewrite
from kernel_peers import SHAPES, Shape
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from vllm_unsafe_routes.kernels import RouteRows, jitter_triton, route_topk_triton, row_index_triton
from vllm_unsafe_routes.kernels.spec import RouteWatch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MARK = "compile-table"
NUM_TOKENS, MANY_TOKENS, NUM_ROWS = 64, 16384, 64
AMD_LOAD_BITS = {
    "ubyte": 8,
    "sbyte": 8,
    "ushort": 16,
    "sshort": 16,
    "short": 16,
    "dword": 32,
    "dwordx2": 64,
    "dwordx3": 96,
    "dwordx4": 128,
}

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One specialisation of one kernel.

    Attributes:
        name: row of the table.
        selections: warp-wide reductions on the path whose instructions are counted; 0: count all instructions.
        launch: makes the kernel and the launch's positional and keyword arguments.
        reduction: which reductions these are.

    """

    name: str
    selections: int
    launch: Callable[[], Launch]
    reduction: str = "REDUX.MAX"


@dataclass(frozen=True, slots=True)
class Facts:
    """What one compiled kernel needs.

    Attributes:
        registers: per thread.
        spilled: bytes of stack per thread, where an instruction uses it (CUDA), or spilled registers plus scratch bytes (AMD).
        shared: bytes of shared memory per program.
        load_bits: widest global load of one thread.
        instructions: of one warp, see above.

    """

    registers: int
    spilled: int
    shared: int
    load_bits: int
    instructions: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.instructions} / {self.load_bits}"


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A tensor with an aligned address and nothing behind it."""
    return torch.empty(shape, dtype=dtype, device="meta")


def route_launch(
    shape: Shape,
    dtype: torch.dtype,
    directives: bool,
    routes: bool = False,
    soft: bool = False,
    only_directed: bool = False,
    in_engine: bool = False,
    num_tokens: int = NUM_TOKENS,
) -> Launch:
    """The launch of the route kernel for a model; `in_engine`: under a policy with overrides, all that one launch has to write."""
    routes, only_directed = routes or in_engine, only_directed or in_engine
    experts, top_k = shape.spec.num_experts, shape.spec.top_k
    rows = row_index = None
    if directives:
        row_index = meta(num_tokens)
        rows = RouteRows(
            meta(NUM_ROWS),
            meta(NUM_ROWS, (experts + 31) // 32),
            meta(NUM_ROWS, top_k),
            meta(NUM_ROWS, top_k, dtype=torch.float32),
            meta(NUM_ROWS, experts, dtype=torch.float32) if soft else None,
            meta(NUM_ROWS, 2, (experts + 31) // 32) if soft else None,
        )
    _, positional, keywords = route_topk_triton.launch_arguments(
        router_logits=meta(num_tokens, experts, dtype=dtype),
        row_index=row_index,
        rows=rows,
        spec=shape.spec,
        correction_bias=meta(experts, dtype=torch.float32) if shape.correction_bias else None,
        is_padding=meta(num_tokens, dtype=torch.bool) if in_engine else None,
        topk_weights=meta(num_tokens, top_k, dtype=torch.float32),
        topk_ids=meta(num_tokens, top_k),
        native_ids=meta(num_tokens, top_k) if in_engine else None,
        routes_ids=meta(num_tokens, top_k) if routes else None,
        routes_weights=meta(num_tokens, top_k, dtype=torch.float32) if routes else None,
        watch=RouteWatch(meta(2), meta(1), meta(1, dtype=torch.int64)) if in_engine else None,
        only_directed=only_directed,
    )
    return route_topk_triton.route_topk_kernel, positional, keywords


def row_index_launch() -> Launch:
    """The launch of the row index kernel."""
    _, positional, keywords = row_index_triton.launch_arguments(
        row_index=meta(16, NUM_TOKENS),
        idx_mapping=meta(8),
        query_start_loc=meta(9),
        positions=meta(NUM_TOKENS, dtype=torch.int64),
        slot_base=meta(64, dtype=torch.int64),
        slot_listed=meta(64),
        slot_prompt_len=meta(64),
        arena=meta(4096),
        policy_rows=meta(16),
    )
    return row_index_triton.fill_row_index_kernel, positional, keywords


def jitter_launch(num_experts: int) -> Launch:
    """The launch of the kernel for noise on bf16 router logits."""
    _, positional, keywords = jitter_triton.launch_arguments(
        router_logits=meta(NUM_TOKENS, num_experts, dtype=torch.bfloat16),
        out=meta(NUM_TOKENS, num_experts, dtype=torch.bfloat16),
        step=meta(1, dtype=torch.int64),
        forced=meta(NUM_TOKENS, dtype=torch.bool),
        layer=3,
        seed=1 << 40,
        scale=0.5,
    )
    return jitter_triton.jitter_logits_kernel, positional, keywords


def variants() -> list[Variant]:
    """All rows of the table."""

    def route(name: str, shape: Shape, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Variant:
        return Variant(f"{shape.label}, {name}", shape.spec.top_k, lambda: route_launch(shape, dtype, **options))

    def of_many(name: str, shape: Shape, **options: Any) -> Variant:
        tokens = route_topk_triton.tokens_per_program(shape.spec, MANY_TOKENS)
        launch = functools.partial(route_launch, shape, torch.bfloat16, num_tokens=MANY_TOKENS, **options)
        return Variant(f"{shape.label}, {name}, {tokens} tokens a program", 0, launch)

    made = []
    for shape in SHAPES:
        made += [
            route("bf16, no directives", shape, directives=False),
            route("bf16, directives", shape, directives=True),
            route("bf16, directives + routes output", shape, directives=True, routes=True),
        ]
    for shape in SHAPES:
        if route_topk_triton.tokens_per_program(shape.spec, MANY_TOKENS) > 1:
            made += [
                of_many("bf16, no directives", shape, directives=False),
                of_many("bf16, directives", shape, directives=True),
                of_many("bf16, only directed tokens, all outputs", shape, directives=True, soft=True, in_engine=True),
            ]
    olmoe = next(shape for shape in SHAPES if shape.name == "OLMoE")
    soft_launch = functools.partial(route_launch, olmoe, torch.bfloat16, directives=True, soft=True)
    made += [
        route("fp32, no directives", olmoe, torch.float32, directives=False),
        route("fp32, directives", olmoe, torch.float32, directives=True),
        route("bf16, directives + soft ones", olmoe, directives=True, soft=True),
        # A changed logit has no 16 bits and no packed key, so each of its selections ends in a minimum; so does the smallest logit.
        Variant("OLMoE 64/8, bf16, directives + soft ones: a biased token", 8, soft_launch, "REDUX.MIN"),
        Variant("OLMoE 64/8, bf16, directives + soft ones: a promoted or demoted expert", 9, soft_launch, "REDUX.MIN"),
        route("bf16, only directed tokens", olmoe, directives=True, only_directed=True),
        route("bf16, only directed tokens, all outputs", olmoe, directives=True, soft=True, in_engine=True),
        Variant("row index", 0, row_index_launch),
        Variant("jitter, 64 experts, bf16", 0, lambda: jitter_launch(64)),
    ]
    return made


def compile_for(launch: Launch, target: GPUTarget) -> Any:
    """Compile what this launch would compile at its first call on the target."""
    kernel, positional, keywords = launch
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*positional, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def facts_of(compiled: Any, target: GPUTarget, variant: Variant) -> Facts:
    """Read the compilers' results."""
    if target.backend == "cuda":
        return _cuda_facts(compiled.asm["cubin"], compiled.metadata.shared, variant)
    return _amd_facts(compiled.asm["amdgcn"], compiled.metadata.shared)


def _cuda_facts(cubin: bytes, shared: int, variant: Variant) -> Facts:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path))
        sass = _output(triton.knobs.nvidia.nvdisasm.path, "--print-code", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    code = [(match[1], match[2]) for match in re.finditer(r"^(?:(\.L\w+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?) ?;)", sass, re.MULTILINE)]
    loads = [_cuda_load_bits(text) for _, text in code if text and re.search(r"\bLDG", text)]
    # ptxas reserves stack that it then does without: Qwen1.5-MoE's several tokens a program on sm_90 have 8 bytes and no access.
    spilled = stack + local if re.search(r"\b(?:STL|LDL)\b", sass) else 0
    return Facts(registers, spilled, shared, max(loads), _count_instructions(code, variant.selections, variant.reduction))


def _count_instructions(code: list[tuple[str | None, str | None]], selections: int, reduction: str) -> int:
    """Instructions on the shortest path from the entry to an exit that makes the selections.

    Args:
        code: labels and instructions in order, one of each pair None.
        selections: integer reductions over the warp that the path must have; 0: count all instructions up to the last exit.
        reduction: their opcode.

    """
    blocks: list[list[str]] = [[]]
    of_label: dict[str, int] = {}
    for label, text in code:
        if label is not None:
            if blocks[-1]:
                blocks.append([])
            of_label[label] = len(blocks) - 1
        if text is not None:
            blocks[-1].append(text)
            if re.search(r"\b(?:BRA|EXIT)\b", text):
                blocks.append([])
    exits = [at for at, block in enumerate(blocks) if block and re.search(r"\bEXIT\b", block[-1])]
    if not selections:
        return sum(map(len, blocks[: exits[-1] + 1]))
    # Shortest first: instructions up to and with a block, selections made by then.
    made_in = [sum(reduction in text for text in block) for block in blocks]
    queue = [(len(blocks[0]), 0, min(made_in[0], selections))]
    seen = set()
    while queue:
        length, at, made = heapq.heappop(queue)
        if at in exits and made == selections:
            return length
        if (at, made) in seen:
            continue
        seen.add((at, made))
        last = blocks[at][-1] if blocks[at] else ""
        target = re.search(r"\bBRA\b.*\((\.L\w+)\)", last)
        leaves = target is not None or at in exits
        # A branch on a uniform predicate names it behind the opcode, others are guarded.
        conditional = last.startswith("@") or "BRA.U " in last
        followers = [] if leaves and not conditional else [at + 1]
        if target is not None:
            followers.append(of_label[target[1]])
        for other in followers:
            heapq.heappush(queue, (length + len(blocks[other]), other, min(made + made_in[other], selections)))
    raise RuntimeError(f"no path makes {selections} selections")


def _cuda_load_bits(name: str) -> int:
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in re.split(r"[. ]", name) if part in widths), 32)


def _amd_facts(text: str, shared: int) -> Facts:
    def count(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", text)[-1])

    body = text[: text.index(".section", text.index("s_endpgm"))]
    operations = re.findall(r"^\s+((?:[svd]s?|global|buffer|scratch|flat)_[a-z0-9_]+)", body, re.MULTILINE)
    loads = [AMD_LOAD_BITS[kind] for kind in re.findall(r"(?:global|buffer|flat)_load_([a-z0-9]+)", body)]
    spilled = count("vgpr_spill_count") + count("sgpr_spill_count") + count("private_segment_fixed_size")
    return Facts(count("vgpr_count"), spilled, shared, max(loads), len(operations))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def table(rows: dict[str, dict[str, Facts]], targets: Iterable[str]) -> str:
    """Markdown, one row a variant."""
    names = list(targets)
    lines = [
        f"| variant | {' | '.join(names)} | spilled | shared |",
        "|---" * (len(names) + 3) + "|",
    ]
    for variant, facts in rows.items():
        spilled = max(fact.spilled for fact in facts.values())
        shared = max(fact.shared for fact in facts.values())
        lines.append(f"| {variant} | {' | '.join(str(facts[name]) for name in names)} | {spilled} | {shared} |")
    lines += ["", f"Triton {triton.__version__} with the ptxas it ships; num_warps 1 for the route kernel, 4 for the row index."]
    return "\n".join(lines)


def rows_in(document: str) -> list[str]:
    """Variants of a committed table."""
    found = re.search(f"<!-- {MARK}:begin -->(.*?)<!-- {MARK}:end -->", document, re.DOTALL)
    if found is None:
        raise SystemExit(f"the document has no marks {MARK}")
    return re.findall(r"^\| ([^|]+?) \|", found[1], re.MULTILINE)[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all four")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="compile only variants whose name contains one of these")
    parser.add_argument("--out", type=Path, metavar="DOCUMENT", help="rewrite the table in this document")
    parser.add_argument(
        "--check", type=Path, metavar="DOCUMENT", help="compare the rows of this document's table with the variants"
    )
    args = parser.parse_args()
    if args.out and (args.only or set(args.targets) != set(TARGETS)):
        parser.error("--out writes the whole table: leave out --only and --targets")

    all_variants = variants()
    failures = []
    if args.check:
        expected, found = [variant.name for variant in all_variants], rows_in(args.check.read_text())
        if found != expected:
            differing = sorted(set(expected) ^ set(found)) or ["their order"]
            failures.append(f"{args.check} lists other variants: {'; '.join(differing)}")
    rows: dict[str, dict[str, Facts]] = {}
    for variant in all_variants:
        if args.only and not any(text in variant.name for text in args.only):
            continue
        launch = variant.launch()
        rows[variant.name] = {name: facts_of(compile_for(launch, TARGETS[name]), TARGETS[name], variant) for name in args.targets}
        print(variant.name, *rows[variant.name].values(), sep=" | ", file=sys.stderr, flush=True)
        failures += [f"{variant.name} spills {fact.spilled} on {name}" for name, fact in rows[variant.name].items() if fact.spilled]
    text = table(rows, args.targets)
    print(text)
    if args.out:
        rewrite(args.out, MARK, text)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
