"""The FLOP counter against XLA's where that counts right, and against arithmetic where not."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from training_cases import optimizer, train_step

from catversion_jax.config import make_config
from catversion_jax.models.layers.attention_pallas import transposed_attention
from catversion_jax.models.stable_diffusion import abstract_backbone
from catversion_jax.runtime.sharding import make_mesh
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.planning.flops import count_flops
from catversion_jax.training.start import planned_step

LEFT, RIGHT = jnp.ones((32, 48)), jnp.ones((48, 64))
IMAGE, KERNEL = jnp.ones((2, 17, 17, 8)), jnp.ones((3, 3, 8, 16))


def counted(function: Callable[..., Any], *args: Any) -> float:
    return count_flops(jax.jit(function).trace(*args).jaxpr)


def xla(function: Callable[..., Any], *args: Any) -> float:
    return jax.jit(function).trace(*args).lower().cost_analysis()["flops"]


def convolve(image: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(image, kernel, strides, "VALID", dimension_numbers=numbers)


def test_products_and_convolutions_are_what_xla_counts() -> None:
    assert counted(jnp.matmul, LEFT, RIGHT) == 2 * 32 * 48 * 64 == xla(jnp.matmul, LEFT, RIGHT)
    for stride in (1, 2):
        found = counted(lambda x, k, s=stride: convolve(x, k, s), IMAGE, KERNEL)
        assert found == xla(lambda x, k, s=stride: convolve(x, k, s), IMAGE, KERNEL)


def test_a_loop_counts_as_often_as_it_runs() -> None:
    square = jnp.ones((16, 16))

    def looped(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (carry @ square, None), x, length=7)[0]

    assert counted(looped, square) == 7 * 2 * 16**3
    assert counted(lambda x: jax.lax.map(lambda row: row @ square, x), square) == 2 * 16**3


def test_a_kernel_counts_as_often_as_its_grid_has_cells() -> None:
    """Forward: two products; backward: five, one of them the logits again."""
    arrays = [jnp.ones((3, 8, 1024))] * 3

    def attend(*arrays: jax.Array) -> jax.Array:
        return transposed_attention(*arrays, 1.0).sum()

    product = 3 * 2 * 8 * 1024**2
    assert counted(attend, *arrays) == 2 * product
    assert counted(jax.grad(attend, argnums=(0, 1, 2)), *arrays) == 7 * product
    stacked = [jnp.stack([array] * 2) for array in arrays]
    assert counted(jax.vmap(attend), *stacked) == 4 * product


def test_recomputation_is_counted() -> None:
    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.tanh(x @ RIGHT) ** 2)

    once = counted(loss, LEFT)
    assert counted(jax.grad(loss), LEFT) == 2 * once
    assert counted(jax.grad(jax.checkpoint(loss)), LEFT) == 3 * once


@pytest.mark.slow
def test_the_training_step_is_what_xla_counts() -> None:
    """No loop in it at 64 pixels; XLA leaves out products with padding and adds the rest."""
    backbone = abstract_backbone("tiny-sd")
    config = make_config({"concepts": "x", "steps_per_dispatch": 1, "resolution": 64})
    mesh = make_mesh(1, jax.devices()[:1])
    planned = planned_step(config, backbone)
    arguments = abstract_arguments(planned, mesh, num_rows=1, max_images=5)
    step: Any = train_step(backbone, optimizer(config), mesh, config)
    traced = step.trace(*arguments)
    found = traced.lower().cost_analysis()["flops"]
    assert count_flops(traced.jaxpr) == pytest.approx(found, rel=0.1)
