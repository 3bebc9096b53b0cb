"""What is written on the host reaches the device in one copy, as the last write left it."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_unsafe_routes.engine.mirrored import Mirrored

PLACES = st.one_of(
    st.integers(0, 9),
    st.tuples(st.integers(0, 9), st.integers(1, 10)).map(lambda ends: slice(min(ends), max(ends))),
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True).map(np.array),
)


def away_from_the_host(mirrored: Mirrored) -> Mirrored:
    """As on a GPU: memory of its own."""
    mirrored.tensor = mirrored.tensor.clone()
    mirrored._is_shared = False
    return mirrored


@given(steps=st.lists(st.lists(st.tuples(PLACES, st.integers(-5, 5)), max_size=4), max_size=4))
@settings(deadline=None)
def test_the_device_follows_the_host_at_each_flush(steps):
    original, torch.Tensor.pin_memory = torch.Tensor.pin_memory, torch.Tensor.clone  # pinning needs a GPU
    try:
        mirrored, expected = away_from_the_host(Mirrored((10, 2), -1, np.int32, torch.device("cpu"))), np.full((10, 2), -1)
        for writes in steps:
            before = mirrored.tensor.clone()
            for at, value in writes:
                mirrored.write(at, value)
                expected[at] = value
            assert torch.equal(mirrored.tensor, before)
            mirrored.flush()
            assert mirrored.tensor.tolist() == expected.tolist() == mirrored.host.tolist()
    finally:
        torch.Tensor.pin_memory = original


def test_on_cpu_both_are_the_same_memory():
    mirrored = Mirrored((3,), 0, np.int64, torch.device("cpu"))
    mirrored.write(1, 7)
    assert mirrored.tensor.tolist() == [0, 7, 0]
