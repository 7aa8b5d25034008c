"""The UNet's cross-attention maps against torch diffusers with a processor that keeps the
probabilities.
"""

import jax
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="parity needs torch and diffusers: pip install '.[test]'"
)
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install '.[test]'")

from small_networks import FORWARD, QUICK, SD1_LIKE, SD2_LIKE, StoreProbabilities, build, forward  # noqa: E402
from torch_reference import draw, nchw, relative_error  # noqa: E402

CONFIGS = {"sd1": SD1_LIKE, "sd2": SD2_LIKE, "only-cross": FORWARD["only-cross"]}


@jax.jit(compiler_options=QUICK)
def with_maps(unet, sample, timesteps, text, token_weights):
    return unet.call("attention_maps", sample, timesteps, text, token_weights)


@pytest.mark.parametrize(
    "name", ["sd1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd2", "only-cross"))]
)
def test_maps_equal_diffusers_probabilities(name):
    reference, unet = build(CONFIGS[name])
    sample, text, timesteps = draw(2, 8, 12, 4, seed=1), draw(2, 7, 24, seed=2), np.array([3, 981])
    token_weights = np.array([[0, 0, 0.5, 0.5, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]], np.float32)
    kept = []
    reference.set_attn_processor(StoreProbabilities(kept))
    reference(nchw(sample), torch.tensor(timesteps), torch.tensor(text))

    prediction, maps = with_maps(unet, sample, timesteps, text, token_weights)
    assert len(maps) == len(kept) > 2
    assert {ours.shape[0] for ours in maps} == {2}
    for ours, probabilities in zip(maps, kept, strict=True):
        expected = np.einsum("BNST,BT->BS", probabilities, token_weights) / probabilities.shape[1]
        assert ours.shape[2] == 1.5 * ours.shape[1]  # rows first: the sample is 8 x 12
        assert relative_error(ours.reshape(2, -1), expected) < 1e-5

    # The whole text gets all of the attention.
    _, maps = with_maps(unet, sample, timesteps, text, np.ones((2, 7), np.float32))
    for everything in maps:
        np.testing.assert_allclose(everything, 1, atol=1e-5)

    # Looking changes nothing.
    np.testing.assert_array_equal(prediction, forward(unet, sample, timesteps, text))
