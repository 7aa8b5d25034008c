"""Every way through attention against torch's, and which platform takes which."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch: pip install '.[test]'")

from torch_reference import draw, relative_error  # noqa: E402

from catversion_jax.models.layers.attention import (  # noqa: E402
    MAX_LOGITS,
    attention,
    lane_attention,
    sliced_attention,
)


def assert_equals_torch(attend, positions: int, head_dim: int, keys: int | None = None) -> None:
    """Forward and gradients, float32, within the tolerance of a layer."""
    lengths = (positions, keys or positions, keys or positions, positions)
    arrays = [draw(1, n, 2, head_dim, seed=seed) for seed, n in enumerate(lengths)]
    *inputs, weight = [torch.tensor(array).swapaxes(1, 2) for array in arrays]  # torch: [B N T H]
    for tensor in inputs:
        tensor.requires_grad_()
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
    (expected * weight).sum().backward()

    def weighted(query, key, value):
        out = attend(query, key, value)
        return (out * arrays[3]).sum(), out

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(*arrays[:3])
    assert relative_error(out, expected.detach().swapaxes(1, 2).numpy()) < 1e-5
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert relative_error(gradient, tensor.grad.swapaxes(1, 2).numpy()) < 1e-5


@pytest.mark.parametrize("positions", [48 * 48, 2311])  # 2311 is a prime: it cannot be sliced
def test_long_sequences_equal_torch(positions):
    assert positions**2 > MAX_LOGITS
    assert_equals_torch(attention, positions, 4)
    assert_equals_torch(functools.partial(sliced_attention, scale=0.5), positions, 4)


@pytest.mark.parametrize(
    ("positions", "head_dim", "keys"),
    [(1024, 40, 1024), (1536, 80, 1536), (1152, 64, 1152), (1024, 40, 77), (1280, 64, 300)],
)
def test_the_kernel_of_the_tpu_equals_torch(positions, head_dim, keys):
    """Its operations one by one on the CPU: blocks of 512, 256 and 128, keys that fill no lanes."""
    interpreted = functools.partial(lane_attention, scale=head_dim**-0.5, interpret=True)
    assert_equals_torch(interpreted, positions, head_dim, keys)


def test_the_kernel_of_the_tpu_finds_the_largest_logit_where_the_bound_is_far_above():
    """One key is ten thousand times as long as the others and at right angles to every query."""
    query, key, value = (draw(1, 128, 2, 8, seed=seed) for seed in range(3))
    query[..., :4] = 0
    key[:, 5, :, :4] = 1e4
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(array).swapaxes(1, 2) for array in (query, key, value))
    )
    out = lane_attention(query, key, value, scale=8**-0.5, interpret=True)
    assert relative_error(out, expected.swapaxes(1, 2).numpy()) < 1e-5


def test_the_kernel_of_the_tpu_takes_a_concept_axis_and_bfloat16():
    arrays = [draw(2, 1, 1024, 2, 40, seed=seed) for seed in range(3)]
    kernel = functools.partial(lane_attention, scale=40**-0.5, interpret=True)
    halves = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    found = jax.jit(jax.vmap(kernel))(*halves)
    assert found.dtype == jnp.bfloat16
    for concept in range(2):
        exact = attention(*(half[concept].astype(jnp.float32) for half in halves))
        assert relative_error(found[concept].astype(jnp.float32), exact) < 2e-2  # 8 bits


def lowered_for(
    platform: str, positions: int, head_dim: int = 40, dtype=jnp.bfloat16, keys: int | None = None
) -> str:
    """The program of a gradient, as it is given to the compiler of a platform that is not here."""

    def loss(query, key, value):
        return attention(query, key, value).astype(jnp.float32).sum()

    query, key = (
        jax.ShapeDtypeStruct((1, n, 2, head_dim), dtype) for n in (positions, keys or positions)
    )
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(query, key, key)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_decides_where_it_pays():
    kernel = "tpu_custom_call"
    assert kernel in lowered_for("tpu", 4096)
    assert kernel in lowered_for("tpu", 1024, head_dim=80)
    assert kernel in lowered_for("tpu", 4096, keys=77)
    assert kernel not in lowered_for("tpu", 256, head_dim=160)  # XLA is as good
    assert kernel not in lowered_for("tpu", 33 * 33)  # does not fill the lanes
    assert kernel not in lowered_for("tpu", 16384, head_dim=128)  # more than the fast memory
    assert kernel not in lowered_for("cpu", 4096)


def test_cudnn_is_taken_on_nvidia(monkeypatch):
    """Without such a GPU: JAX is told that there is one, the program is written, not run."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    assert "cudnn$fmha" in lowered_for("cuda", 4096)
    assert "cudnn$fmha" in lowered_for("cuda", 1024, head_dim=80)
    assert "cudnn$fmha" not in lowered_for("cuda", 1024, head_dim=160)
    assert "cudnn$fmha" not in lowered_for("cuda", 4096, keys=77)
    assert "cudnn$fmha" not in lowered_for("cuda", 4096, dtype=jnp.float32)
    assert "cudnn$fmha" not in lowered_for("cpu", 4096)


def test_a_concept_axis_in_front_of_slices():
    query, key, value = (draw(2, 1, 48 * 48, 1, 4, seed=seed) for seed in range(3))
    stacked = jax.vmap(attention)(query, key, value)
    for concept in range(2):
        alone = attention(query[concept], key[concept], value[concept])
        np.testing.assert_allclose(stacked[concept], alone, rtol=0, atol=1e-6)
