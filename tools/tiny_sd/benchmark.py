"""Samples per second, forward and backward, in torch and in JAX: ``python benchmark.py``.

Both sides hold the same networks; the best of four calls counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from train_clip import TEXT_WIDTH
from train_unet import UNET, make_unet
from train_vae import make_vae

from catversion_jax.models import vae
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.unet import unet
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.weights.network import Network, random_network

UNET_BATCH, VAE_BATCH, TOKENS = 48, 16, 32


def best(call: Callable[[], object], batch: int) -> float:
    """Samples per second of the fastest of four calls, after one more."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return batch / min(seconds[1:])


def torch_unet(bfloat16: bool) -> float:
    """The denoiser in torch, as it is trained or in float32."""
    network = make_unet()
    x = torch.randn(UNET_BATCH, 4, 16, 16)
    text = torch.randn(UNET_BATCH, TOKENS, TEXT_WIDTH)
    t = torch.randint(0, 1000, (UNET_BATCH,))

    def call() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            prediction = network(x, t, text).sample.float()
        prediction.square().mean().backward()

    return best(call, UNET_BATCH)


def jax_unet() -> float:
    """The denoiser in JAX, float32: XLA's bfloat16 is slower on CPU."""
    config = {"_class_name": "UNet2DConditionModel", **UNET}
    network = random_network(
        lambda rngs: unet.UNet2DConditionModel(
            UNetConfig.from_hf(config), layers=LayerFactory(rngs)
        )
    )
    x = np.random.randn(UNET_BATCH, 16, 16, 4).astype(np.float32)
    text = np.random.randn(UNET_BATCH, TOKENS, TEXT_WIDTH).astype(np.float32)
    t = np.random.randint(0, 1000, (UNET_BATCH,))
    step = jax.jit(jax.grad(lambda network: jnp.square(network(x, t, text)).mean()))
    return best(lambda: jax.block_until_ready(step(network)), UNET_BATCH)


def torch_vae() -> float:
    """Encoder and decoder in torch."""
    network = make_vae()
    x = torch.randn(VAE_BATCH, 3, 64, 64)

    def call() -> None:
        y = network.decode(network.encode(x).latent_dist.sample()).sample
        (y - x).square().mean().backward()

    return best(call, VAE_BATCH)


def jax_vae() -> float:
    """Encoder and decoder in JAX."""
    config = {"_class_name": "AutoencoderKL", **make_vae().config}
    network = random_network(
        lambda rngs: vae.AutoencoderKL(vae.VAEConfig.from_hf(config), layers=LayerFactory(rngs))
    )
    x = jnp.asarray(np.random.randn(VAE_BATCH, 64, 64, 3), jnp.float32)

    def loss(network: Network) -> jax.Array:
        mean, std = vae.vae_encode(network, x)
        return jnp.square(vae.vae_decode(network, mean + std) - x).mean()

    step = jax.jit(jax.grad(loss))
    return best(lambda: jax.block_until_ready(step(network)), VAE_BATCH)


if __name__ == "__main__":
    print(f"UNet: torch bfloat16 {torch_unet(True):.0f}, float32 {torch_unet(False):.0f}")
    print(f"UNet: jax float32 {jax_unet():.0f}")
    print(f"VAE: torch {torch_vae():.0f}, jax {jax_vae():.0f}")
