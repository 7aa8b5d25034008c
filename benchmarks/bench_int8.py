"""The frozen UNet in int8, on TPUs that are not here and in what tiny-sd learns: ``python
bench_int8.py products|step|learn``; wants ``pip install qwix``.

Dense layers and convolutions multiply 8-bit whole numbers: weights with a scale for each output
channel, activations with one for each position (dense layers) or image (convolutions), from their
largest value; with ``backward`` the gradient times the weight as well, else in the computation's
own width. Attention, norms and the text encoders stay as they are. Weights are rounded in the
program, from what the network holds.

- ``products``: single products at full effort; cycles are the compiler's own estimate.
- ``step``: the training step of Stable Diffusion 1.5 (512 pixels, two images for each of four
  concepts) beside ``bench_aot.py``'s row in bfloat16, which has the FLOPs of all products; memory
  and FLOPs in int8 are read from the compiled program, HBM traffic is ``hbm_traffic.py``'s. Rows
  that are in ``--out`` are not made again.
- ``learn``: trains the examples of tiny-sd on this machine, plain and in int8, into folders of
  WORK, and compares the learned keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import re
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx
from hbm_traffic import hbm_bytes
from jax.interpreters.partial_eval import dce_jaxpr
from machine import write_results
from random_models import write_sd15_configurations

import catversion_jax as cv
from catversion_jax.config import make_config
from catversion_jax.models.stable_diffusion import abstract_backbone
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.sharding import replicated
from catversion_jax.training.planning.abstract import abstract_arguments
from catversion_jax.training.planning.chips import parse_slice
from catversion_jax.training.planning.compiled import compile_program, tpu_mesh
from catversion_jax.training.planning.flops import count_flops
from catversion_jax.training.start import planned_step

RESULTS = Path(__file__).parent / "results" / "int8.json"
PLAIN_RESULTS = RESULTS.with_name("aot.json")
INT8_PEAK = {"v5e": 394e12, "v6e": 1836e12}
"""Operations per second of a chip: docs.cloud.google.com/tpu/docs/{v5e,v6e}."""
CLOCK = {"v5e": 1.5e9, "v6e": 1.75e9}
"""Cycles per second that the estimates for a large bfloat16 product agree with."""
CONCEPTS, IMAGES = 4, 2
DENSE, ALL = ("dot_general",), ("dot_general", "conv_general_dilated")
VARIANTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "plain": ((), False),
    "dense": (DENSE, True),
    "forward": (ALL, False),
    "both": (ALL, True),
}
"""Which layers, and whether backward too."""
LEARNED = ("plain", "forward", "both")
ROWS = [(chip, name) for chip in ("v5e:1x1", "v6e:1x1") for name in ("both", "dense", "forward")]


def in_int8(network: Network, layers: tuple[str, ...], *, backward: bool) -> Network:
    """The same network, its ``layers`` in int8; their gradient in the weights is not asked for."""
    if not layers:
        return network
    rule = qwix.QtRule(
        op_names=layers,
        weight_qtype=jnp.int8,
        act_qtype=jnp.int8,
        bwd_qtype=jnp.int8 if backward else None,
    )
    module = nnx.merge(network.graphdef, network.params)
    quantized = qwix.quantize_model(module, qwix.QtProvider([rule]), skip_nnx_init=True)
    graphdef, state = nnx.split(quantized)
    return Network(nnx.to_pure_dict(state), graphdef)


# ---- single products -----------------------------------------------------------------------------

SIDE, WIDTH, BATCH = 32, 640, CONCEPTS * IMAGES
"""The convolutions of Stable Diffusion's second level."""


def products() -> dict[str, tuple[Callable[..., jax.Array], tuple[int, ...], tuple[int, ...]]]:
    """Functions of left, right and the type of the sum, and the shapes of left and right."""

    def dense(left: jax.Array, right: jax.Array, total: Any) -> jax.Array:
        return jnp.matmul(left, right, preferred_element_type=total)

    def convolution(left: jax.Array, right: jax.Array, total: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            left,
            right,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=total,
        )

    def shifted(left: jax.Array) -> list[jax.Array]:
        around = jnp.pad(left, ((0, 0), (1, 1), (1, 1), (0, 0)))
        places = [(row, column) for row in range(3) for column in range(3)]
        parts = [around[:, row : row + SIDE, column : column + SIDE] for row, column in places]
        return [part.reshape(-1, WIDTH) for part in parts]

    def side_by_side(left: jax.Array, right: jax.Array, total: Any) -> jax.Array:
        return dense(jnp.concatenate(shifted(left), -1), right.reshape(9 * WIDTH, WIDTH), total)

    def nine(left: jax.Array, right: jax.Array, total: Any) -> jax.Array:
        kernels = right.reshape(9, WIDTH, WIDTH)
        parts = zip(shifted(left), kernels, strict=True)
        return functools.reduce(jnp.add, [dense(part, kernel, total) for part, kernel in parts])

    images, kernel = (BATCH, SIDE, SIDE, WIDTH), (3, 3, WIDTH, WIDTH)
    return {
        "dense 4096 x 4096 x 4096": (dense, (4096, 4096), (4096, 4096)),
        "convolution, 8 images": (convolution, images, kernel),
        "convolution, 32 images": (convolution, (4 * BATCH, *images[1:]), kernel),
        "nine dense products": (nine, images, kernel),
        "one of nine times the width": (side_by_side, images, kernel),
    }


def compile_product(target: str, name: str, dtype: Any) -> dict[str, float]:
    """Cycles and operations per second that the compiler expects."""
    function, left, right = products()[name]
    total = jnp.int32 if dtype == jnp.int8 else jnp.float32

    def scaled(left: jax.Array, right: jax.Array) -> jax.Array:
        return (function(left, right, total) * jnp.float32(0.01)).astype(jnp.bfloat16)

    chip = parse_slice(target).chip.name
    sharding = replicated(tpu_mesh(parse_slice(target)))
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in (left, right)]
    lowered = jax.jit(scaled).trace(*shapes).lower(lowering_platforms=("tpu",))
    found = re.findall(r'"estimated_cycles":"(\d+)"', lowered.compile().as_text())
    cycles = sum(map(int, found))
    operations = 2 * math.prod(left[:-1]) * math.prod(right)
    return {"cycles": cycles, "per_second": operations / cycles * CLOCK[chip]}


# ---- the training step ---------------------------------------------------------------------------


def compile_row(target: str, layers: tuple[str, ...], backward: bool, folder: Path) -> dict:
    """What the compiler says of the step of Stable Diffusion 1.5."""
    started = time.perf_counter()
    chip, mesh = parse_slice(target).chip, tpu_mesh(parse_slice(target))
    options: dict[str, Any] = {
        "resolution": 512,
        "train_batch_size": IMAGES,
        "steps_per_dispatch": 10,
    }
    options |= {"concepts": "planned", "gradient_checkpointing": "none"}
    backbone = abstract_backbone(write_sd15_configurations(folder), dtype="bfloat16")
    planned = planned_step(make_config(options), backbone)
    backbone = dataclasses.replace(backbone, unet=in_int8(backbone.unet, layers, backward=backward))
    planned = dataclasses.replace(planned, backbone=backbone)
    _, compiled = compile_program(planned, mesh, abstract_arguments(planned, mesh, CONCEPTS, 5))
    memory, samples = compiled.memory_analysis(), CONCEPTS * IMAGES
    traffic, whole = hbm_bytes(compiled.as_text()) / samples, int8_flops(backbone.unet, 512)
    plain = json.loads(PLAIN_RESULTS.read_text())["rows"][f"{target} none {CONCEPTS}"]
    flops = plain["flops_per_sample"]
    return {
        "temporary_bytes_per_sample": memory.temp_size_in_bytes / samples,
        "total_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes,
        "hbm_ms_per_sample": 1e3 * traffic / chip.bytes_per_s,
        "int8_flops_per_sample": whole,
        "other_flops_per_sample": flops - whole,
        "flop_ms_per_sample": 1e3
        * (whole / INT8_PEAK[chip.name] + (flops - whole) / chip.flops_per_s),
        "compile_seconds": round(time.perf_counter() - started),
    }


def int8_flops(unet: Network, resolution: int) -> float:
    """Of a sample's products of whole numbers, as ``planning/flops.py`` counts them."""
    side = resolution // 8
    latents = jax.ShapeDtypeStruct((1, side, side, 4), jnp.bfloat16)
    context = jax.ShapeDtypeStruct((1, 77, 768), jnp.bfloat16)

    def predicted(context: jax.Array, latents: jax.Array, unet: Network) -> jax.Array:
        return unet(latents, 500, context).sum()

    traced = jax.make_jaxpr(jax.grad(predicted))(context, latents, unet).jaxpr
    used, _ = dce_jaxpr(traced, [True] * len(traced.outvars))  # not the weights' own gradient
    return _of_int8(used)


def _of_int8(jaxpr: Any) -> float:
    flops = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name in ALL:
            if {variable.aval.dtype.name for variable in equation.invars} == {"int8"}:
                flops += count_flops(types.SimpleNamespace(eqns=[equation]))
            continue
        parts = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
        flops += sum(_of_int8(part) for part in parts if _is_program(part))
    return flops


def _is_program(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


# ---- what is learned -----------------------------------------------------------------------------


def learn(concepts: str, work: Path, only: str) -> None:
    """Train concepts of tiny-sd with each UNet; cosines of their keys with the plain UNet's."""
    for name in LEARNED:
        if not name.startswith(only):
            continue
        layers, backward = VARIANTS[name]
        backbone = cv.load_backbone("tiny-sd")
        unet = in_int8(backbone.unet, layers, backward=backward)
        options = ["preset=fast", "validation_steps=null", "evaluate_after=false"]
        options += [
            f"concepts={concepts}",
            f"output_dir={work / name}",
            "compilation_cache_dir=null",
        ]
        config = cv.load_config("quickstart", options)
        cv.train(config, backbone=dataclasses.replace(backbone, unet=unet))
    for file in sorted(work.glob("*/concepts/*/catversion.safetensors")):
        name = file.parts[-4]
        plain = work / "plain" / Path(*file.parts[-3:])
        if name != "plain" and plain.is_file():
            one, other = keys_of(file), keys_of(plain)
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            print(name, file.parts[-2], f"{cosine:.4f}")


def keys_of(file: Path) -> np.ndarray:
    """All keys of a concept as one vector."""
    learned = cv.load_concept(file).learned
    if not isinstance(learned, cv.KVResidual):
        raise TypeError(f"{file}: holds a {type(learned).__name__}, must be a KVResidual")
    return np.ravel(learned.key)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("products", "step", "learn"))
    parser.add_argument("--concepts", default="tiny-sd-examples", help="folder of learn")
    parser.add_argument("--work", type=Path, default=Path("int8-work"), help="where learn trains")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", help="rows that begin so: 'v5e:1x1 both'")
    args = parser.parse_args()
    if args.what == "learn":
        learn(args.concepts, args.work, args.only)
        return
    results: dict[str, Any] = {"products": {}, "step": {}}
    if args.out.is_file():
        results |= json.loads(args.out.read_text())
    tasks: dict[str, Callable[[], dict[str, Any]]]
    if args.what == "step":
        folder = Path(tempfile.mkdtemp()) / "model"
        tasks = {
            f"{chip} {name}": functools.partial(compile_row, chip, *VARIANTS[name], folder)
            for chip, name in ROWS
        }
    else:
        tasks = {
            f"{chip} {name}, {dtype.__name__}": functools.partial(
                compile_product, chip, name, dtype
            )
            for chip in ("v5e:1x1", "v6e:1x1")
            for name in products()
            for dtype in (jnp.bfloat16, jnp.int8)
            if dtype == jnp.int8 or not name.startswith(("nine", "one"))
        }
    known = results[args.what]
    for name, task in tasks.items():
        if name in known or not name.startswith(args.only):
            continue
        known[name] = task()
        print(name, known[name], flush=True)
        write_results(args.out, {key: results[key] for key in ("products", "step")})


if __name__ == "__main__":
    main()
