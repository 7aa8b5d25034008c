"""The training step of Stable Diffusion 1.5 and XL on TPUs that are not here: ``python bench_aot.py
[--model sdxl]``.

Compiles the real step (512 and 1024 pixels, batch of two, bfloat16) for one device of each kind of
chip, with some numbers of concepts and kinds of recomputation, and for a slice, and reads the
compiled programs: memory and collectives are the compiler's; HBM traffic is ``hbm_traffic.py``'s;
FLOPs are ``planning/flops.py``'s, of Stable Diffusion 1.5 those of the logits that the backward
pass computes again apart. Rows called ``plain`` are the bare gradient of the UNet in its
conditions, written as one would at first: XLA's attention, ``vmap`` over the concepts, no text
encoder, no optimizer. One core needs about three minutes for each program of 1.5 and ten for XL;
rows that are in ``--out`` already are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import tempfile
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from hbm_traffic import hbm_bytes
from jax.sharding import Mesh
from machine import write_results
from random_models import write_sd15_configurations, write_sdxl_configurations

from catversion_jax.config import make_config
from catversion_jax.models.layers import multi_head
from catversion_jax.models.stable_diffusion import Backbone, abstract_backbone
from catversion_jax.models.unet.embeddings import AddedConditions
from catversion_jax.runtime.sharding import replicated
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.planning.chips import parse_slice
from catversion_jax.training.planning.compiled import (
    FAST_COMPILATION,
    compile_program,
    count_collectives,
    tpu_mesh,
)
from catversion_jax.training.planning.flops import count_flops
from catversion_jax.training.start import planned_step

MINIMUM = 1670e9 + 6.5e9
"""FLOPs of a sample: UNet and the last three layers of the text encoder, nothing computed again."""
PEER_CLASSIC_STEP = 5.965e12 / 2
"""FLOPs of a sample of diffusers 0.35.2's textual_inversion_flax step, compiled the same way."""
PLAIN = "plain"
Row = tuple[str, str, int] | tuple[str, str, int, int]
"""Chip, recomputation, concepts, and the images of a concept's step where they are not two."""
SD15_ROWS: tuple[Row, ...] = (
    ("v5e:1x1", "none", 4),
    ("v5e:1x1", "none", 1),
    ("v5e:1x1", "none", 1, 8),
    ("v5e:1x1", "none", 5),
    ("v5e:1x1", "none", 8),
    ("v5e:1x1", "none", 10),
    ("v5e:1x1", "none", 12),
    ("v5e:1x1", "attention", 4),
    ("v5e:1x1", "blocks", 60),
    ("v5e:4x4", "none", 4),
    ("v5p:1x1x1", "none", 4),
    ("v6e:1x1", "none", 4),
    ("tpu7x:2x2x1", "none", 4),
)
SDXL_ROWS: tuple[Row, ...] = (
    ("v5e:1x1", "none", 1),
    ("v5e:1x1", "attention", 1),
    ("v5e:1x1", "blocks", 1),
    ("v6e:1x1", "none", 1),
    ("v6e:1x1", "blocks", 4),
    ("v5p:1x1x1", "none", 4),
    ("tpu7x:2x2x1", "none", 4),
    ("v5p:1x1x1", PLAIN, 1),
    ("v5p:1x1x1", "none", 1),
)
MODELS = {
    "sd15": (512, write_sd15_configurations, SD15_ROWS),
    "sdxl": (1024, write_sdxl_configurations, SDXL_ROWS),
}


def row_name(model: str, row: Row) -> str:
    """As it stands in the results; rows of Stable Diffusion 1.5 came first and name no model."""
    words = [*row[:3], *(f"batch {size}" for size in row[3:])]
    return " ".join(map(str, words if model == "sd15" else (model, *words)))


def compile_row(
    backbone: Backbone,
    resolution: int,
    target: str,
    recompute: str,
    num_concepts: int,
    batch_size: int = 2,
) -> dict[str, Any]:
    """What the compiler says of one program."""
    chip, mesh = parse_slice(target).chip, tpu_mesh(parse_slice(target))
    started = time.perf_counter()
    if recompute == PLAIN:
        traced, compiled = compile_plain(backbone, resolution, mesh, num_concepts)
    else:
        config = make_config(
            {
                "concepts": "planned",
                "resolution": resolution,
                "train_batch_size": batch_size,
                "steps_per_dispatch": 10,
                "gradient_checkpointing": recompute,
            }
        )
        planned = planned_step(config, backbone)
        arguments = abstract_arguments(planned, mesh, num_concepts * mesh.devices.shape[0], 5)
        traced, compiled = compile_program(planned, mesh, arguments)
    program, memory = compiled.as_text(), compiled.memory_analysis()
    samples = batch_size * num_concepts
    traffic = hbm_bytes(program) / samples
    return {
        "temporary_bytes_per_sample": memory.temp_size_in_bytes / samples,
        "total_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "memory_bytes": chip.device_memory_bytes,
        "hbm_bytes_per_sample": traffic,
        "hbm_ms_per_sample": 1e3 * traffic / (chip.bytes_per_s / chip.devices),
        "flops_per_sample": count_flops(traced.jaxpr) / samples,
        "collectives": count_collectives(program),
        "compile_seconds": round(time.perf_counter() - started),
    }


def compile_plain(
    backbone: Backbone, resolution: int, mesh: Mesh, num_concepts: int
) -> tuple[Any, Any]:
    """The gradient of a UNet's prediction in what it is told of the prompts, two images for each of
    ``num_concepts`` concepts, for one device; traced and compiled.
    """
    side, everywhere = resolution // backbone.latent_downsampling, replicated(mesh)
    unet = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        backbone.unet,
    )
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16, sharding=everywhere)
    text = floats((num_concepts, 2, 77, 2048))
    pooled = floats((num_concepts, 2, 1280))
    latents = floats((num_concepts, 2, side, side, backbone.latent_channels))

    def predicted(conditions: Any, latents: jax.Array, weights: Any) -> jax.Array:
        context, pooled = conditions
        added = AddedConditions(pooled, jnp.zeros((2, 6), jnp.float32))
        prediction = weights(latents, jnp.full(2, 500), context, added=added)
        return jnp.square(prediction.astype(jnp.float32)).mean()

    gradient = jax.vmap(jax.grad(predicted), in_axes=(0, 0, None))
    with _plain_attention():
        traced = jax.jit(gradient).trace((text, pooled), latents, unet)
        lowered = traced.lower(lowering_platforms=("tpu",))
    return traced, lowered.compile(compiler_options=FAST_COMPILATION)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    def plain(query: jax.Array, key: jax.Array, value: jax.Array, **kwargs: Any) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, implementation="xla", **kwargs)

    with unittest.mock.patch.object(multi_head, "attention", plain):
        yield


def recomputed_logits() -> float:
    """FLOPs of a sample for the logits that the backward pass of the TPU's kernel computes again.

    Five transformers each work on 64 x 64 positions of width 320 and on 32 x 32 of 640, both on the
    positions themselves and on 77 tokens, which fill 128. Before the first cross-attention nothing
    is differentiated, so the first self-attention is left out.
    """
    self_attention = 2 * (4 * 4096**2 * 320 + 5 * 1024**2 * 640)
    cross_attention = 2 * 5 * 128 * (4096 * 320 + 1024 * 640)
    return float(self_attention + cross_attention)


def as_table(rows: dict[str, Any]) -> str:
    """Markdown, Stable Diffusion 1.5."""
    again = recomputed_logits()
    lines = [
        "| chip, recomputation, concepts | temporaries, GB per sample | all, GB | HBM, ms per "
        "sample | GFLOP per sample (logits again) | of the minimum | collectives |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    names = [row_name("sd15", row) for row in SD15_ROWS]
    rows = {name: rows[name] for name in names if name in rows}
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | does not compile: {row['error'][:80]} |")
            continue
        flops = row["flops_per_sample"]
        lines.append(
            f"| {name} | {row['temporary_bytes_per_sample'] / 1e9:.3f} | "
            f"{row['total_bytes'] / 1e9:.2f} of {row['memory_bytes'] / 1e9:.0f} | "
            f"{row['hbm_ms_per_sample']:.2f} | {flops / 1e9:.0f} ({again / 1e9:.0f}) | "
            f"{(flops - again) / MINIMUM:.3f} | {sum(row['collectives'].values())} |"
        )
    first = names[0]
    if first in rows:
        share = rows[first]["flops_per_sample"] / PEER_CLASSIC_STEP
        lines.append(
            f"\nFLOPs of {first}, in units of the peer's classic step: {share:.3f}, "
            f"without the logits {share - again / PEER_CLASSIC_STEP:.3f}; "
            f"the minimum {MINIMUM / PEER_CLASSIC_STEP:.3f}."
        )
    return "\n".join(lines)


def as_xl_table(rows: dict[str, Any]) -> str:
    """Markdown, Stable Diffusion XL."""
    lines = [
        "| chip, recomputation, concepts | temporaries, GB per sample | all, GB of one device | "
        "HBM, ms per sample | GFLOP per sample | collectives |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in [row_name("sdxl", row) for row in SDXL_ROWS]:
        row, shown = rows.get(name), name.removeprefix("sdxl ")
        if row is None:
            continue
        if "error" in row:
            lines.append(f"| {shown} | does not fit: {row['error'][:160]} |")
            continue
        lines.append(
            f"| {shown} | {row['temporary_bytes_per_sample'] / 1e9:.2f} | "
            f"{row['total_bytes'] / 1e9:.2f} of {row['memory_bytes'] / 1e9:.0f} | "
            f"{row['hbm_ms_per_sample']:.1f} | {row['flops_per_sample'] / 1e9:.0f} | "
            f"{sum(row['collectives'].values())} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Compile what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="sd15")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "aot.json")
    parser.add_argument("--only", default="", help="rows that begin so: 'v5e:1x1 blocks'")
    args = parser.parse_args()
    known: dict[str, Any] = {}
    if args.out.is_file():
        known = json.loads(args.out.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        resolution, write_configurations, rows = MODELS[args.model]
        backbone = abstract_backbone(write_configurations(Path(folder) / "model"), dtype="bfloat16")
        for row in rows:
            name = row_name(args.model, row)
            if name in known or not row_name("sd15", row).startswith(args.only):
                continue
            try:
                known[name] = compile_row(backbone, resolution, *row)
            except Exception as error:  # does not fit: that is a result
                known[name] = {"error": str(error).splitlines()[0][:300]}
            write_results(args.out, {"rows": known})
            print(name, known[name], flush=True)
    print(as_table(known) if args.model == "sd15" else as_xl_table(known))


if __name__ == "__main__":
    main()
