"""Elementary layers that are written here, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch: pip install '.[test]'")

from torch_reference import draw, relative_error  # noqa: E402

from catversion_jax.models.layers.activations import gelu, quick_gelu  # noqa: E402
from catversion_jax.models.layers.resnet import GroupNorm  # noqa: E402


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


@pytest.mark.parametrize("mean", [0.0, 50.0])  # E[x^2] - E[x]^2 would lose 1e-4 of the latter
def test_group_norm_is_torchs(mean):
    x, weight, bias = draw(2, 5, 7, 12, seed=0) + mean, draw(12, seed=1), draw(12, seed=2)
    theirs = torch.nn.GroupNorm(3, 12, eps=1e-5, dtype=torch.float64)
    theirs.weight.data, theirs.bias.data = torch.tensor(weight), torch.tensor(bias)
    expected = theirs.double()(torch.tensor(x, dtype=torch.float64).movedim(-1, 1)).movedim(1, -1)
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):
        ours = GroupNorm(12, 3, 1e-5, dtype=dtype, param_dtype="float32")
        ours.scale[...], ours.bias[...] = weight, bias
        found = ours(jnp.asarray(x))
        assert found.dtype == dtype
        assert relative_error(found.astype(jnp.float32), expected.detach().numpy()) < tolerance
