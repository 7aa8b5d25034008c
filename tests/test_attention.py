"""Long sequences, which go through attention in slices, against torch."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch: pip install '.[test]'")

from torch_reference import draw, relative_error  # noqa: E402

from catversion_jax.models.attention import MAX_LOGITS, attention  # noqa: E402


@pytest.mark.parametrize("positions", [48 * 48, 2311])  # 2311 is a prime: it cannot be sliced
def test_long_sequences_equal_torch(positions):
    assert positions**2 > MAX_LOGITS
    arrays = [draw(1, positions, 2, 4, seed=seed) for seed in range(4)]
    *inputs, weight = [torch.tensor(array).swapaxes(1, 2) for array in arrays]  # torch: [B N T H]
    for tensor in inputs:
        tensor.requires_grad_()
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs)
    (expected * weight).sum().backward()

    def weighted(query, key, value):
        out = attention(query, key, value)
        return (out * arrays[3]).sum(), out

    run = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, out), gradients = run(*arrays[:3])
    assert relative_error(out, expected.detach().swapaxes(1, 2).numpy()) < 1e-5
    for gradient, tensor in zip(gradients, inputs, strict=True):
        assert relative_error(gradient, tensor.grad.swapaxes(1, 2).numpy()) < 1e-5


def test_a_concept_axis_in_front_of_slices():
    query, key, value = (draw(2, 1, 48 * 48, 1, 4, seed=seed) for seed in range(3))
    stacked = jax.vmap(attention)(query, key, value)
    for concept in range(2):
        alone = attention(query[concept], key[concept], value[concept])
        np.testing.assert_allclose(stacked[concept], alone, rtol=0, atol=1e-6)
