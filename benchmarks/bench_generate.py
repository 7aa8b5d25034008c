"""Images per second, ours against the diffusers pipeline: ``python benchmarks/bench_generate.py``.

The same model, prompts, sampler (DPM-Solver++ 2M), steps and guidance; encoding of the prompt and
decoding of the image included, loading and compiling not. First the pictures of both, from the same
initial latents, are compared. Ours draws as ``catversion generate``
does: spread over the devices (``JAX_NUM_CPU_DEVICES``), on each as many together as is its default.
diffusers draws all of a call together.
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
import torch
from bench_step import DTYPES, RESULTS, models
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from machine import describe_machine, interleaved, ratios, spread, write_results

from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.runtime.sharding import make_mesh, replicated
from catversion_jax.sampling.denoising import GeneratedImages, draw_requests
from catversion_jax.sampling.requests import ImageRequest

PROMPT = "a teapot on the beach"
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}


def seconds(task: Callable[[], Any]) -> float:
    """Of one call; images are on the host afterwards in both programs."""
    started = time.perf_counter()
    task()
    return time.perf_counter() - started


def compare(ours: Callable[..., GeneratedImages], theirs: Callable[..., Any], pipe: Any) -> float:
    """Mean difference of the pixels (0..1) of one picture, from the same initial latents."""
    side = pipe.unet.config.sample_size
    latents = np.random.default_rng(0).standard_normal((1, 4, side, side), np.float32)
    given = torch.tensor(latents).to(pipe.device, pipe.unet.dtype)
    expected = theirs([PROMPT], latents=given, output_type="np").images
    return float(np.abs(ours(latents=latents).pixels - expected).mean())


def main() -> None:
    """Time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-sd", help="diffusers folder, or sd15 [tiny-sd]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="of a call [1 4]")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("/tmp/catversion-bench"))
    parser.add_argument("--out", type=Path, default=RESULTS / "generate.json")
    args = parser.parse_args()
    folder = models(args.model, args.work)
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe.to(device, DTYPES[args.dtype])
    pipe.unet.to(memory_format=torch.channels_last)
    tasks: dict[str, Callable[[], Any]] = {}
    draw = functools.partial(pipe, num_inference_steps=args.steps, guidance_scale=7.5)
    settings = SamplingSettings(
        sampler="dpmsolver++", num_inference_steps=args.steps, guidance_scale=7.5
    )
    for count in args.images:
        mesh = make_mesh(1, jax.devices()[:count])
        backbone = load_backbone(folder, dtype=args.dtype, sharding=replicated(mesh))
        requests = [ImageRequest(PROMPT, seed=seed) for seed in range(count)]
        tasks[f"ours, {count}"] = functools.partial(draw_requests, backbone, requests, settings)
        tasks[f"diffusers, {count}"] = functools.partial(draw, [PROMPT] * count)
    command = " ".join(["python", "benchmarks/bench_generate.py", *sys.argv[1:]])
    results: dict[str, Any] = {
        "command": command,
        "devices": jax.device_count(),
        "model": args.model,
        "dtype": args.dtype,
    }
    ours = functools.partial(draw_requests, backbone, requests[:1], settings)
    difference = compare(ours, draw, pipe)
    print(f"same latents, mean difference of the pixels: {difference:.1e}", flush=True)
    write_results(args.out, results | {"difference": difference})
    if difference > TOLERANCE[args.dtype]:
        sys.exit("ours and diffusers' are not the same pictures")
    for task in tasks.values():  # compiles
        task()
    found = interleaved(tasks, args.rounds, seconds)
    print(f"{describe_machine()}\n\n{args.steps} steps, {args.dtype}\n")
    print("| images of a call | images per s | ratio |")
    print("| --- | ---: | ---: |")
    for count in args.images:
        pair = [found[f"{who}, {count}"] for who in ("ours", "diffusers")]
        for who, row in zip(("ours", "diffusers"), pair, strict=True):
            middle, low, high = spread([count / s for s in row])
            times = "{:.2f} [{:.2f}, {:.2f}]".format(*ratios(*pair)) if who == "ours" else ""
            print(f"| {who}, {count} | {middle:.2f} [{low:.2f}, {high:.2f}] | {times} |")
    write_results(args.out, results | {"difference": difference, "seconds": found})


if __name__ == "__main__":
    main()
