"""Random routes: many draws at once are the draws of the generator one after the other."""

import numpy as np
import pytest

from vllm_unsafe_routes.search.masks import subsets


@pytest.mark.parametrize("population", [1, 2, 3, 8, 60, 64, 256])
def test_subsets_are_those_of_the_generator(population):
    for size in {0, 1, 2, 3, 4, 8, population - 1, population} & set(range(population + 1)):
        ours, numpys = np.random.default_rng(size), np.random.default_rng(size)
        assert subsets(ours, population, size, 5) == [set(numpys.choice(population, size, replace=False)) for _ in range(5)]
        assert ours.integers(1 << 40) == numpys.integers(1 << 40)
