"""Seconds to decode one picture: the autoencoder of Stable Diffusion, and TAESD
(``validation_vae``): ``python benchmarks/bench_preview.py``.

Full size with random weights, on which speed does not depend; float32, compiled before.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from machine import describe_machine, interleaved, spread

from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.models.weights.network import Network, random_network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))


@jax.jit
def decode(vae: Network, latents: jax.Array) -> jax.Array:
    """One picture."""
    return vae.call("decode", latents)


def seconds(task: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    jax.block_until_ready(task())
    return time.perf_counter() - started


def main() -> None:
    """Time and print."""
    from torch_reference import SD15_VAE

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=512, help="pixels per side [512]")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    side = args.resolution // 8
    latents = np.random.default_rng(0).normal(size=(1, side, side, 4)).astype(np.float32)
    full, tiny = VAEConfig.from_hf(SD15_VAE), TinyVAEConfig.from_hf({})
    networks = {
        "VAE": random_network(lambda rngs: AutoencoderKL(full, layers=LayerFactory(rngs))),
        "TAESD": random_network(lambda rngs: TinyVAE(tiny, layers=LayerFactory(rngs))),
    }
    tasks = {name: functools.partial(decode, one, latents) for name, one in networks.items()}
    for task in tasks.values():  # compiles
        jax.block_until_ready(task())
    found = interleaved(tasks, args.rounds, seconds)
    print(f"{describe_machine()}\n\n| decoder | seconds a picture |\n| --- | ---: |")
    for name, times in found.items():
        middle, low, high = spread(times)
        print(f"| {name} | {middle:.3g} [{low:.3g}, {high:.3g}] |")


if __name__ == "__main__":
    main()
