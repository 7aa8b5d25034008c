"""A concept encoder of lower rank: ``python tools/tiny_sd/shrink_start.py FILE OUT --rank 44``.

Of the directions that a fitted encoder can move start values in, those are kept that carry most of
what it predicts, for features as its whitening makes them (independent, of variance 1).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from catversion_jax.methods.concept_encoder import ConceptEncoder, load_concept_encoder

NUM_SAMPLES = 20_000


def shrunk(encoder: ConceptEncoder, rank: int) -> tuple[ConceptEncoder, float]:
    """The encoder with the ``rank`` strongest directions, and their share of the variance."""
    weights = encoder.weights
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_SAMPLES, weights.linear.shape[0])).astype(np.float32)
    hidden = np.asarray(jax.nn.gelu(x @ weights.hidden + weights.hidden_bias))
    codes = x @ weights.linear + hidden @ weights.out  # [samples R]
    root = np.linalg.cholesky((codes.T @ codes / NUM_SAMPLES).astype(np.float64))
    _, lengths, directions = np.linalg.svd(root.T @ weights.basis, full_matrices=False)
    basis = directions[:rank].astype(np.float32)  # [rank n]
    turned = weights.basis @ basis.T  # [R rank]
    arrays: dict[str, Any] = {
        "linear": weights.linear @ turned,
        "out": weights.out @ turned,
        "basis": basis,
    }
    smaller = dataclasses.replace(weights, **arrays)
    share = float((lengths[:rank] ** 2).sum() / (lengths**2).sum())
    return dataclasses.replace(encoder, weights=smaller), share


def main() -> None:
    """Shrink one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    args = parser.parse_args()
    encoder, share = shrunk(load_concept_encoder(args.file), args.rank)
    path = encoder.save(args.out)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB, {share:.1%} of what was predicted")


if __name__ == "__main__":
    main()
