"""``catversion plan --config FILE --tpu v5e:4x4``: what a run will need, before it is paid for.

Compiles the real training step for the named TPU, on a machine without one, from shapes alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import textwrap
from typing import TYPE_CHECKING, Any

from catversion_jax.errors import CatVersionError

if TYPE_CHECKING:
    from catversion_jax.training.planning.abstract import PlannedStep
    from catversion_jax.training.planning.chips import Slice

GB = 1e9
MOST_CONCEPTS, MOST_IMAGES = 10**9, 10**4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.usage = "catversion plan --config FILE (--tpu SLICE | --gpu NAME) [key=value ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file of training options")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that win over the file"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tpu", metavar="SLICE", help="TPU slice: v5e:4x4, v5p:2x2x1, ...")
    where.add_argument(
        "--gpu",
        metavar="NAME",
        help="GPU, of which the plan is a rough estimate: a100, h100, h200, l4",
    )
    parser.add_argument(
        "--concepts", type=int, default=1000, help="number of concepts to train [1000]"
    )
    parser.add_argument(
        "--images", type=int, default=5, help="number of images of the largest concept [5]"
    )
    parser.add_argument(
        "--price_per_chip_hour",
        "--price-per-chip-hour",
        type=float,
        help="price of one chip for one hour, in any currency, to print the cost",
    )
    parser.add_argument(
        "--utilization",
        type=float,
        default=0.3,
        help="share of the chip's peak that is assumed [0.3]",
    )
    parser.add_argument(
        "--full_effort",
        "--full-effort",
        action="store_true",
        help="compile with the same effort as training does, which takes much longer",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    from catversion_jax.config import load_config
    from catversion_jax.config.sampling import check_count

    config = load_config(args.config, [*args.overrides, "concepts=planned"])
    check_count("--concepts", args.concepts, MOST_CONCEPTS)
    check_count("--images", args.images, MOST_IMAGES)
    if args.price_per_chip_hour is not None and args.price_per_chip_hour < 0:
        raise CatVersionError(
            f"--price_per_chip_hour {args.price_per_chip_hour}: must be at least 0."
        )
    if not 0 < args.utilization <= 1:
        raise CatVersionError(f"--utilization {args.utilization}: must be above 0, at most 1.")
    # The TPU is compiled for, not used; what runs here runs on the CPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from catversion_jax.methods.table import method_for
    from catversion_jax.models.stable_diffusion import abstract_backbone
    from catversion_jax.training.start import planned_step

    method_for(config.method_options)
    dtype = "float32" if config.mixed_precision == "no" else "bfloat16"
    model = config.pretrained_model_name_or_path
    backbone = abstract_backbone(
        model, revision=config.revision, prediction_type=config.prediction_type, dtype=dtype
    )
    config = dataclasses.replace(
        config,
        resolution=config.resolution or backbone.default_resolution,
        steps_per_dispatch=config.steps_per_dispatch or 10,
    )
    planned = planned_step(config, backbone)
    plan = _tpu_plan(args, planned) if args.tpu else _gpu_plan(args, planned)
    plan = {"model": model, "resolution": config.resolution, "dtype": dtype, **plan}
    print(json.dumps(plan, indent=1) if args.json else _as_text(plan))
    return 0


def _tpu_plan(args: argparse.Namespace, planned: PlannedStep) -> dict[str, Any]:
    from catversion_jax.runtime.sharding import CONCEPT_AXIS
    from catversion_jax.training.planning.chips import parse_slice
    from catversion_jax.training.planning.compiled import tpu_mesh
    from catversion_jax.training.planning.fitting import (
        find_fit,
        images_per_row,
        usual_rows,
        whole_tiles,
    )

    target = parse_slice(args.tpu)
    devices = planned.devices
    mesh = tpu_mesh(target, devices.data_parallel)
    is_auto, wanted = devices.concepts_per_device == "auto", usual_rows(devices)
    needed = -(-args.concepts // mesh.shape[CONCEPT_AXIS])
    most = max(wanted, needed) if is_auto else wanted
    device_memory = target.chip.device_memory_bytes
    fit = find_fit(
        planned, mesh, device_memory, wanted, most, args.images, fast=not args.full_effort
    )
    memory, largest, step = fit.memory, fit.largest, fit.step
    flops = step.flops / step.rows
    if is_auto:
        wanted = max(1, whole_tiles(largest, images_per_row(planned)))
    rows = min(wanted, largest)
    return {
        "target": target.name,
        "chips": target.num_chips,
        "devices": target.num_devices,
        "estimate": (
            "memory as the TPU compiler says; FLOPs of the program's products and convolutions; "
            "time from those and the chip's published peaks at the given utilization. Not compared "
            "with a real TPU yet."
        ),
        "compiles": True,
        "compile_seconds": round(fit.seconds, 1),
        "gradient_checkpointing": fit.recompute,
        "memory_bytes": {
            "device": device_memory,
            "weights": memory.weights,
            "state_per_row": memory.state_per_row,
            "temporaries": memory.temporary_once,
            "temporaries_per_row": memory.temporary_per_row,
            "with_concepts_per_device": memory.bytes_of(wanted),
        },
        "concepts_per_device": wanted,
        "largest_concepts_per_device": largest,
        "flops_per_concept_step": flops,
        "bytes_per_concept_step": step.bytes_accessed / step.rows,
        "collectives": step.collectives,
        **_jobs(args, planned, target, rows, flops, memory.weights),
    }


def _gpu_plan(args: argparse.Namespace, planned: PlannedStep) -> dict[str, Any]:
    from catversion_jax.training.planning.chips import GPUS, Slice
    from catversion_jax.training.planning.compiled import counted_flops
    from catversion_jax.training.planning.fitting import usual_rows

    if args.gpu not in GPUS:
        raise CatVersionError(f"--gpu {args.gpu}: must be one of {', '.join(GPUS)}.")
    target = Slice(dataclasses.replace(GPUS[args.gpu], slices=("1", "2", "4", "8")), "1")
    flops = counted_flops(planned, args.images)
    rows = usual_rows(planned.devices)
    return {
        "target": args.gpu,
        "chips": 1,
        "devices": 1,
        "estimate": (
            "FLOPs of the program's products and convolutions, and the data sheet's peak at the "
            "given utilization; memory is not estimated. Not compared with a real GPU yet."
        ),
        "concepts_per_device": rows,
        "flops_per_concept_step": flops,
        **_jobs(args, planned, target, rows, flops, 0.0),
    }


def _jobs(
    args: argparse.Namespace,
    planned: PlannedStep,
    target: Slice,
    rows: int,
    flops: float,
    least_bytes: float,
) -> dict[str, Any]:
    from catversion_jax.training.planning.estimate import job, step_seconds

    max_train_steps = planned.optimizer.max_train_steps
    jobs = []
    if rows:
        seconds = step_seconds(rows * flops, least_bytes, target.chip, args.utilization)
        price = args.price_per_chip_hour
        found = []
        for other in target.others():
            at_once = rows * (other.num_devices // planned.devices.data_parallel)
            if at_once:
                one = job(args.concepts, max_train_steps, other.num_chips, at_once, seconds, price)
                found.append((other.topology, one))
        jobs = [
            {
                "slice": topology,
                "chips": one.chips,
                "concepts_at_once": one.concepts_at_once,
                "seconds_per_step": one.seconds_per_step,
                "hours": one.hours,
                "cost": one.cost,
            }
            for topology, one in found
        ]
    return {
        "concepts": args.concepts,
        "max_train_steps": max_train_steps,
        "utilization": args.utilization,
        "jobs": jobs,
    }


def _as_text(plan: dict[str, Any]) -> str:
    lines = [
        f"{plan['model']} at {plan['resolution']} px, {plan['dtype']}, on {plan['target']} "
        f"({plan['chips']} chips, {plan['devices']} devices)",
        textwrap.indent(textwrap.fill(plan["estimate"], 98), "  "),
    ]
    if "memory_bytes" in plan:
        memory = {name: value / GB for name, value in plan["memory_bytes"].items()}
        collectives = ", ".join(f"{n} {kind}" for kind, n in plan["collectives"].items()) or "none"
        lines += [
            f"compiles         yes ({plan['compile_seconds']:.0f} s, "
            f"gradient_checkpointing={plan['gradient_checkpointing']})",
            f"memory per device {memory['device']:.0f} GB",
            f"  weights        {memory['weights']:.3f} GB",
            f"  state          {memory['state_per_row']:.4f} GB per row",
            f"  temporaries    {memory['temporaries']:.3f} GB + "
            f"{memory['temporaries_per_row']:.3f} GB per row",
            f"  together       {memory['with_concepts_per_device']:.2f} GB with "
            f"concepts_per_device={plan['concepts_per_device']}; at most "
            f"{plan['largest_concepts_per_device']} fit",
            f"collectives      {collectives}",
            f"bytes            {plan['bytes_per_concept_step'] / GB:.2f} GB per concept and step",
        ]
    lines.append(f"FLOPs            {plan['flops_per_concept_step']:.3e} per concept and step")
    lines.append(
        f"{plan['concepts']} concepts of {plan['max_train_steps']} steps at "
        f"{100 * plan['utilization']:.0f} % of the peak:"
    )
    if not plan["jobs"]:
        lines.append("  not even one concept fits on a device")
    for one in plan["jobs"]:
        cost = "" if one["cost"] is None else f"  cost {one['cost']:.2f}"
        lines.append(
            f"  {one['slice']:>7} {one['chips']:4d} chips, "
            f"{one['concepts_at_once']} concepts at once  {one['hours']:9.3f} h{cost}"
        )
    return "\n".join(lines)
