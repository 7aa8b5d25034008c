"""Activations against torch's, values and slopes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch: pip install '.[test]'")

from catversion_jax.models.activations import gelu, quick_gelu  # noqa: E402


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-4)])
def test_gelu_is_torchs(dtype, tolerance):
    """In bfloat16 far below its own precision (1e-2): both compute in float32 inside."""
    x = jnp.linspace(-8, 8, 4001).astype(dtype)
    theirs = torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, dtype)).requires_grad_()
    expected = torch.nn.functional.gelu(theirs)
    expected.sum().backward()
    found, pull = jax.vjp(jax.jit(gelu), x)
    (slope,) = pull(jnp.ones_like(found))
    assert found.dtype == slope.dtype == x.dtype
    for ours, other in ((found, expected.detach()), (slope, theirs.grad)):
        difference = np.abs(np.asarray(ours, np.float32) - other.float().numpy())
        assert difference.max() <= tolerance


def test_quick_gelu_is_transformers():
    from transformers.activations import ACT2FN

    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    expected = ACT2FN["quick_gelu"](torch.tensor(x)).numpy()
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), expected, atol=1e-6)
