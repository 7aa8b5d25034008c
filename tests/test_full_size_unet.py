"""UNet and autoencoder at the full size of SD 1.5 and SD 2.1, random weights, against torch
diffusers.

By hand, ``pytest -m slow -s tests/test_full_size_unet.py``: twelve minutes on two shared cores and
11 GB of memory. Torch is gone before jax starts, so the weights pass through a folder.

The figures are in docs/results/parity.md.
"""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip(
    "torch", reason="parity needs torch and diffusers: pip install '.[test]'"
)
diffusers = pytest.importorskip("diffusers", reason="parity needs diffusers: pip install '.[test]'")

from torch_reference import (  # noqa: E402
    SD15_UNET,
    SD15_VAE,
    SD21_UNET,
    draw,
    nchw,
    nhwc,
    randomise,
    relative_error,
)

from catversion_jax.models.layers.resnet import LayerFactory  # noqa: E402
from catversion_jax.models.unet.config import UNetConfig  # noqa: E402
from catversion_jax.models.unet.unet import UNet2DConditionModel  # noqa: E402
from catversion_jax.models.vae import AutoencoderKL, VAEConfig, vae_decode, vae_encode  # noqa: E402
from catversion_jax.models.weights.convert import load_network  # noqa: E402

pytestmark = pytest.mark.slow

TIMESTEP = 601


def torch_unet(config, folder, sample, text, weight):
    """Save a random torch UNet; return its prediction and the gradient of the weighted sum in the
    text.
    """
    reference = randomise(diffusers.UNet2DConditionModel.from_config(config))
    reference.save_pretrained(folder)
    reference.enable_gradient_checkpointing()
    reference.train()  # checkpointing acts in train mode only; dropout is 0
    torch_text = torch.tensor(text, requires_grad=True)
    prediction = reference(nchw(sample), torch.tensor([TIMESTEP]), torch_text).sample
    (prediction * nchw(weight)).sum().backward()
    return nhwc(prediction), torch_text.grad.numpy()


@pytest.mark.parametrize(("name", "config"), [("SD 1.5", SD15_UNET), ("SD 2.1", SD21_UNET)])
def test_unet(name, config, tmp_path, record_property):
    sample, weight = draw(1, 64, 64, 4, seed=1), draw(1, 64, 64, 4, seed=2)
    text = draw(1, 77, config["cross_attention_dim"], seed=3)
    expected, expected_gradient = torch_unet(config, tmp_path, sample, text, weight)
    gc.collect()
    unet = load_network(
        lambda rngs: UNet2DConditionModel(UNetConfig.from_hf(config), layers=LayerFactory(rngs)),
        tmp_path,
    )

    @jax.jit
    def text_gradient(unet, text):
        def weighted(text):
            prediction = unet(sample, TIMESTEP, text)
            return (prediction * weight).sum(), prediction

        (_, prediction), gradient = jax.value_and_grad(weighted, has_aux=True)(text)
        return prediction, gradient

    prediction, gradient = text_gradient(unet, text)
    errors = relative_error(prediction, expected), relative_error(gradient, expected_gradient)
    record_property("errors", errors)
    print(f"\n{name} UNet: prediction {errors[0]:.1e}, gradient in the text {errors[1]:.1e}")  # noqa: T201
    assert errors[0] < 1e-4
    assert errors[1] < 1e-3


@pytest.mark.parametrize("size", [256, 512])
def test_vae(size, tmp_path, record_property):
    # SD 2.1's autoencoder has the same configuration but for sample_size.
    reference = randomise(diffusers.AutoencoderKL.from_config(SD15_VAE))
    reference.save_pretrained(tmp_path)
    images, latents = draw(1, size, size, 3, seed=1), draw(1, size // 8, size // 8, 4, seed=2)
    with torch.no_grad():
        posterior = reference.encode(nchw(images)).latent_dist
        expected = (
            nhwc(posterior.mean),
            nhwc(posterior.std),
            nhwc(reference.decode(nchw(latents)).sample),
        )
    del reference, posterior
    gc.collect()
    vae = load_network(
        lambda rngs: AutoencoderKL(VAEConfig.from_hf(SD15_VAE), layers=LayerFactory(rngs)), tmp_path
    )
    mean, std = jax.jit(vae_encode)(vae, images)
    decoded = jax.jit(vae_decode)(vae, jnp.asarray(latents))
    errors = [relative_error(*pair) for pair in zip((mean, std, decoded), expected, strict=True)]
    record_property("errors", errors)
    print(f"\nVAE at {size} px: mean {errors[0]:.1e}, std {errors[1]:.1e}, image {errors[2]:.1e}")  # noqa: T201
    assert np.all(np.array(errors) < 1e-4)
