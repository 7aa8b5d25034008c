"""The training step of Stable Diffusion 1.5 on TPUs that are not here: ``python bench_aot.py``.

Compiles the real step (512 pixels, batch of two, bfloat16) for one chip of each kind, with some
numbers of concepts and kinds of recomputation, and for a slice, and reads the compiled programs:
memory and collectives are the compiler's; HBM traffic is ``hbm_traffic.py``'s; FLOPs are
``planning/flops.py``'s, those of the logits that the backward pass computes again apart. One core
needs about three minutes for each program; rows that are in ``--out`` already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from hbm_traffic import hbm_bytes
from machine import write_results
from random_sd15 import write_sd15_configurations

from catversion_jax.config import make_config
from catversion_jax.models.stable_diffusion import Backbone, abstract_backbone
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.planning.chips import parse_slice
from catversion_jax.training.planning.compiled import compile_program, count_collectives, tpu_mesh
from catversion_jax.training.planning.flops import count_flops
from catversion_jax.training.start import planned_step

MINIMUM = 1670e9 + 6.5e9
"""FLOPs of a sample: UNet and the last three layers of the text encoder, nothing computed again."""
PEER_CLASSIC_STEP = 5.965e12 / 2
"""FLOPs of a sample of diffusers 0.35.2's textual_inversion_flax step, compiled the same way."""
ROWS = (
    ("v5e:1x1", "none", 4),
    ("v5e:1x1", "none", 5),
    ("v5e:1x1", "none", 8),
    ("v5e:1x1", "none", 10),
    ("v5e:1x1", "none", 12),
    ("v5e:1x1", "attention", 4),
    ("v5e:1x1", "blocks", 60),
    ("v5e:4x4", "none", 4),
    ("v5p:1x1x1", "none", 4),
    ("v6e:1x1", "none", 4),
)
NAMED = {" ".join(map(str, row)): row for row in ROWS}


def compile_row(backbone: Backbone, target: str, recompute: str, slots: int) -> dict[str, Any]:
    """What the compiler says of one program."""
    config = make_config(
        {
            "concepts": "planned",
            "resolution": 512,
            "train_batch_size": 2,
            "steps_per_dispatch": 10,
            "gradient_checkpointing": recompute,
        }
    )
    chip, mesh = parse_slice(target).chip, tpu_mesh(parse_slice(target))
    planned = planned_step(config, backbone)
    arguments = abstract_arguments(planned, mesh, slots * mesh.devices.shape[0], 5)
    started = time.perf_counter()
    traced, compiled = compile_program(planned, mesh, arguments)
    program, memory, samples = compiled.as_text(), compiled.memory_analysis(), 2 * slots
    traffic = hbm_bytes(program) / samples
    return {
        "temporary_bytes_per_sample": memory.temp_size_in_bytes / samples,
        "total_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "memory_bytes": chip.memory_bytes,
        "hbm_bytes_per_sample": traffic,
        "hbm_ms_per_sample": 1e3 * traffic / chip.bytes_per_s,
        "flops_per_sample": count_flops(traced.jaxpr) / samples,
        "collectives": count_collectives(program),
        "compile_seconds": round(time.perf_counter() - started),
    }


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
    """Markdown."""
    again = recomputed_logits()
    lines = [
        "| chip, recomputation, concepts | temporaries, GB per sample | all, GB | HBM, ms per "
        "sample | GFLOP per sample (logits again) | of the minimum | collectives |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    rows = {name: rows[name] for name in NAMED if name in rows}
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
    first = next(iter(NAMED))
    if first in rows:
        share = rows[first]["flops_per_sample"] / PEER_CLASSIC_STEP
        lines.append(
            f"\nFLOPs of {first}, in units of the peer's classic step: {share:.3f}, "
            f"without the logits {share - again / PEER_CLASSIC_STEP:.3f}; "
            f"the minimum {MINIMUM / PEER_CLASSIC_STEP:.3f}."
        )
    return "\n".join(lines)


def main() -> None:
    """Compile what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "aot.json")
    parser.add_argument("--only", default="", help="rows that begin so: 'v5e:1x1 blocks'")
    args = parser.parse_args()
    known: dict[str, Any] = {}
    if args.out.is_file():
        known = json.loads(args.out.read_text())["rows"]
    with tempfile.TemporaryDirectory() as folder:
        backbone = abstract_backbone(
            str(write_sd15_configurations(Path(folder) / "sd15")), dtype="bfloat16"
        )
        for name, row in NAMED.items():
            if name in known or not name.startswith(args.only):
                continue
            try:
                known[name] = compile_row(backbone, *row)
            except Exception as error:  # does not fit: that is a result
                known[name] = {"error": str(error).splitlines()[0][:300]}
            write_results(args.out, {"rows": known})
            print(name, known[name], flush=True)
    print(as_table(known))


if __name__ == "__main__":
    main()
