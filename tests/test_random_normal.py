"""Noise drawn in one row is JAX's own, to the bit."""

import jax
import numpy as np
import pytest

from catversion_jax.runtime.random_normal import standard_normal


@pytest.mark.parametrize("shape", [(), (7,), (3, 1, 4, 8), (5, 3, 4)])
def test_the_numbers_are_those_of_jax(shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    ours = jax.jit(jax.vmap(lambda key: standard_normal(key, shape)))(keys)
    for key, numbers in zip(keys, ours, strict=True):
        np.testing.assert_array_equal(numbers, jax.random.normal(key, shape))
