"""The route table's bookkeeping against a plain model of it."""

import itertools
import random

from vllm_unsafe_routes import ModelShape, RoutePlan
from vllm_unsafe_routes.compiler import PlanCompiler
from vllm_unsafe_routes.table import Arena, Ledger, RowStore


def test_rows_are_shared_counted_and_reused():
    rng, store, held = random.Random(1), RowStore(40), []
    contents = [bytes([number]) for number in range(30)]
    for _ in range(2000):
        if held and rng.random() < 0.5:
            store.release(held.pop(rng.randrange(len(held))))
        else:
            wanted = rng.sample(contents, rng.randrange(1, 6))
            before = {content for group in held for content in group}
            ids, new = store.acquire(wanted)
            assert {wanted[at] for at in new} == set(wanted) - before
            assert len(set(ids)) == len(wanted)
            held.append(wanted)
        assert len(store) == len({content for group in held for content in group})


def test_blocks_never_overlap_even_when_they_move():
    rng, arena, size_of, base_of = random.Random(2), Arena(1000), {}, {}
    num_moves = 0
    for step in range(3000):
        if size_of and (rng.random() < 0.45 or sum(size_of.values()) > 900):
            name = rng.choice(sorted(size_of))
            arena.free(name)
            del base_of[name], size_of[name]
        else:
            name, size = f"r{step}", rng.randrange(1, 90)
            if sum(size_of.values()) + size > 1000:
                continue
            base, moved = arena.place(name, size)
            num_moves += len(moved)
            for other, new_base, length in moved:
                assert new_base < base_of[other]
                assert length == size_of[other]
                base_of[other] = new_base
            size_of[name], base_of[name] = size, base
            cells = sorted((start, start + size_of[other]) for other, start in base_of.items())
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(cells))
            assert cells[-1][1] <= 1000
    assert num_moves > 0


def test_the_ledger_admits_what_fits():
    shape = ModelShape("olmoe", 2, 8, (0, 1), num_experts=8, top_k=2)
    compiler = PlanCompiler(shape)
    plans = [compiler.compile(RoutePlan().force(0, [at], [at, 7])) for at in range(3)]
    ledger = Ledger(max_rows=2, max_cells=100, max_slots=3)
    ledger.add("a", plans[0])
    ledger.add("b", plans[1])
    assert ledger.admits(plans[0])
    assert not ledger.admits(plans[2])
    ledger.add("c", plans[0])
    assert not ledger.admits(plans[0])
    ledger.remove("b")
    ledger.remove("unknown")
    assert ledger.admits(plans[2])
    assert not Ledger(10, plans[0].block.size - 1, 3).admits(plans[0])
