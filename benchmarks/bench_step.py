"""One training step, ours against PyTorch's, in one run: ``python benchmarks/bench_step.py``.

The same model, concept, batch of two and precision for all. Ours trains ``--concepts`` concepts in
one program; its seconds are per concept and step. First the losses and gradients of ours and
of the PyTorch CatVersion are compared on the same batch: what is timed is the same computation.

On a CPU the model is tiny-sd. On a GPU, with random weights of Stable Diffusion 1.5's size (made
in ``--work``, 2 GB) and the share of the card's own matrix-product rate, in under ten minutes:

    python benchmarks/bench_step.py --model sd15 --dtype bfloat16 --concepts 1 4 8 --compile \
      --recompute attention

Results are written after every figure: what is stopped keeps what it has found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from device_trace import largest_kernels
from machine import describe_machine, interleaved, ratios, spread, write_results
from torch_trainers import BATCH, CatVersion, TextualInversion, Trainer

from catversion_jax.assets import embedded_folder
from catversion_jax.concepts import ConceptSpec, read_concepts
from catversion_jax.config import make_config
from catversion_jax.diffusion import noise_schedule
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import Backbone, load_backbone
from catversion_jax.models.text_encoders import LowerStates
from catversion_jax.models.weights.network import Network
from catversion_jax.runtime.sharding import make_mesh, replicated
from catversion_jax.training.objective import DiffusionBatch, diffusion_losses
from catversion_jax.training.planning.compiled import counted_flops
from catversion_jax.training.preparation import describe_concept, prepare_concept
from catversion_jax.training.rows import Rows
from catversion_jax.training.start import planned_step
from catversion_jax.training.state import make_optimizer
from catversion_jax.training.step import make_train_step

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
RESULTS = Path(__file__).parent / "results"


class Ours:
    """The compiled training step on so many concepts."""

    def __init__(self, backbone: Backbone, specs: list[ConceptSpec], dtype: str, recompute: str):
        config = make_config(
            {
                "concepts": "given",
                "pretrained_model_name_or_path": backbone.name,
                "num_positions": 4,
                "scope": "from_class_word",
                "instance_prompt": "a {base_class}",
                "learning_rate": 3e-2,
                "train_batch_size": BATCH,
                "concepts_per_device": len(specs),
                "gradient_checkpointing": recompute,
                "mixed_precision": "bf16" if dtype == "bfloat16" else "no",
            }
        )
        data, method = config.data_options, config.method_options
        objective = config.objective_options
        mesh = make_mesh(1, jax.devices()[:1])
        tx = make_optimizer(config.optimizer_options, method)
        self.config, self.backbone = config, backbone
        self.count = jax.device_put(np.int32(1), replicated(mesh))
        self.rows = Rows(
            len(specs), mesh, backbone, objective, tx, averaged=False, max_images=5, max_prompts=1
        )
        records = [
            describe_concept(
                spec, backbone, data, method, seed=config.seed, recorded={}, images={}, networks={}
            )
            for spec in specs
        ]
        prepared = [
            prepare_concept(spec, record, backbone, data, method, objective)
            for spec, record in zip(specs, records, strict=True)
        ]
        for row, concept in enumerate(prepared):
            self.rows.put(self.rows.send({row: concept}, {}), 0.0)
        schedule = noise_schedule(backbone.noise_schedule)
        self.train_step = make_train_step(
            schedule, tx, mesh, objective, config.device_options, ema_decay=None
        )

    def step(self) -> jax.Array:
        """One update of every concept; returns the losses, still on the device."""
        backbone, rows = self.backbone, self.rows
        rows.state, metrics = self.train_step(
            rows.state, rows.data, backbone.text_encoders, backbone.unet, self.count
        )
        return metrics.losses


def compare(backbone: Backbone, peer: CatVersion) -> dict[str, float]:
    """Relative difference of loss and gradient, ours and autograd's, on one batch."""
    torch.manual_seed(1)
    clean = peer.latents(torch.arange(BATCH))
    noise, timesteps = torch.randn_like(clean), torch.tensor([200, 700], device=peer.device)
    loss = peer.loss(clean, noise, timesteps)
    gradients = torch.autograd.grad(loss, peer.learned)

    def nhwc(x: torch.Tensor) -> jax.Array:
        return jnp.asarray(x.float().cpu().numpy().transpose(0, 2, 3, 1))

    layers = peer.concept.layers
    key, value = (jnp.asarray(x.detach().cpu().numpy()) for x in peer.learned)
    residual = KVResidual(key, value, layers=layers, logit_bias=0.0, scope="from_class_word")
    ids = peer.ids.cpu().numpy()
    word = np.isin(ids[0], peer.word)
    word_places = np.tile(np.where(word, np.cumsum(word) - 1, -1).astype(np.int32), (BATCH, 1))
    hidden = backbone.text_encoder.call("lower", ids, layers[0])
    batch = DiffusionBatch(
        nhwc(clean),
        nhwc(noise),
        jnp.asarray(timesteps.int().cpu().numpy()),
        (LowerStates(hidden, jnp.asarray(ids), jnp.asarray(word_places)),),
    )
    schedule = noise_schedule(backbone.noise_schedule)

    def compute(
        residual: KVResidual, text_encoders: tuple[Network, ...], unet: Network
    ) -> jax.Array:
        one, of_one = jax.tree.map(lambda leaf: leaf[None], (residual, batch))
        return diffusion_losses(
            one, text_encoders, unet, of_one, schedule, first_layers=layers[:1]
        ).sum()

    found, grads = jax.jit(jax.value_and_grad(compute))(
        jax.tree.map(jnp.asarray, residual), backbone.text_encoders, backbone.unet
    )
    expected = np.concatenate([g.float().cpu().numpy().ravel() for g in gradients])
    actual = np.concatenate([np.asarray(g).ravel() for g in (grads.key, grads.value)])
    return {
        "loss": abs(float(found) - loss.item()) / loss.item(),
        "gradient": float(np.abs(actual - expected).max() / np.abs(expected).max()),
    }


def torch_trainers(folder: str, spec: ConceptSpec, args: argparse.Namespace) -> dict[str, Trainer]:
    """By the name in the table."""
    dtype = DTYPES[args.dtype]
    found: dict[str, Trainer] = {
        "PyTorch CatVersion": CatVersion(folder, spec, dtype),
        "PyTorch Textual Inversion": TextualInversion(folder, spec, dtype),
    }
    if args.compile:
        found["PyTorch CatVersion, compiled"] = CatVersion(folder, spec, dtype, compiled=True)
    return found


def timed_steps(step: Callable[[], Any], steps: int) -> float:
    """Seconds of a step, the last one waited for."""
    started = time.perf_counter()
    for _ in range(steps):
        last = step()
    if isinstance(last, torch.Tensor):
        last.item()
    else:
        jax.block_until_ready(last)
    return (time.perf_counter() - started) / steps


def matmul_rate(dtype: str) -> float:
    """FLOP/s of a product of two large square matrices on the first device."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    one = jnp.ones((side, side), dtype)
    multiply = jax.jit(jnp.matmul)
    jax.block_until_ready(multiply(one, one))
    return 2 * side**3 / min(timed_steps(lambda: multiply(one, one), 10) for _ in range(5))


def models(name: str, work: Path) -> str:
    """A folder; ``sd15`` and ``sdxl`` make one with random weights."""
    if name not in ("sd15", "sdxl"):
        return str(embedded_folder(name) or name)
    from random_models import write_random_sd15, write_random_sdxl

    return str((write_random_sd15 if name == "sd15" else write_random_sdxl)(work / name))


def main() -> None:
    """Compare, time, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny-sd", help="folder, sd15 or sdxl [tiny-sd]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--recompute",
        default="auto",
        help="gradient_checkpointing of ours [auto: none, without a plan]",
    )
    parser.add_argument("--steps", type=int, default=10, help="of a round [10]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well")
    parser.add_argument("--alone", action="store_true", help="no PyTorch beside it")
    parser.add_argument("--profile", action="store_true", help="the ten largest kernels of ours")
    parser.add_argument("--work", type=Path, default=Path("/tmp/catversion-bench"))
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    folder = models(args.model, args.work)
    backbone = load_backbone(folder, dtype=args.dtype)
    examples = list(read_concepts("tiny-sd-examples").concepts)
    first: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    results: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/bench_step.py", *sys.argv[1:]]),
        "model": args.model,
        "dtype": args.dtype,
        "batch": BATCH,
        "first_step_seconds": first,
        "seconds_per_concept_step": seconds,
    }
    peers = {} if args.alone else torch_trainers(folder, examples[0], args)
    if peers:
        results["difference"] = compare(backbone, peers["PyTorch CatVersion"])  # type: ignore[arg-type]
        print(f"same batch, relative difference: {results['difference']}", flush=True)
        write_results(args.out, results)
        if max(results["difference"].values()) > TOLERANCE[args.dtype]:
            sys.exit("ours and PyTorch's are not the same computation")
    steps: dict[str, Callable[[], Any]] = {name: peer.step for name, peer in peers.items()}
    per_step: dict[str, int] = {}
    for count in args.concepts:
        specs = [examples[i % len(examples)] for i in range(count)]
        name = f"ours, {count} in one program"
        ours = Ours(backbone, specs, args.dtype, args.recompute)
        steps[name], per_step[name] = ours.step, count
    for name, step in steps.items():  # compiles
        first[name] = timed_steps(step, 1)
        seconds[name] = [timed_steps(step, 2) / per_step.get(name, 1)]
        print(f"{name}: first step {first[name]:.1f} s", flush=True)
        write_results(args.out, results)
    if args.profile:
        results["kernels"] = {name: largest_kernels(steps[name]) for name in per_step}
        write_results(args.out, results)
    found = interleaved(steps, args.rounds, lambda step: timed_steps(step, args.steps))
    seconds |= {name: [s / per_step.get(name, 1) for s in row] for name, row in found.items()}
    best = min((n for n in steps if n.startswith("ours")), key=lambda n: spread(seconds[n])[0])
    print(f"\n{describe_machine()}\n\n| step of two images, {args.dtype} | ms | as often as ours |")
    print("| --- | ---: | ---: |")
    for name, row in seconds.items():
        middle, low, high = (1e3 * value for value in spread(row))
        times = "{:.2f} [{:.2f}, {:.2f}]".format(*ratios(seconds[best], row))
        print(f"| {name} | {middle:.1f} [{low:.1f}, {high:.1f}] | {times} |")
    write_results(args.out, results)
    flops = counted_flops(
        planned_step(Ours(backbone, examples[:1], args.dtype, args.recompute).config, backbone), 5
    )
    rate = matmul_rate(args.dtype)
    share = flops / spread(seconds[best])[0] / rate
    results |= {"flops_per_concept_step": flops, "matmul_flops_per_s": rate, "share": share}
    print(f"\n{flops:.3e} FLOP in {best}: {share:.0%} of {rate:.3e} FLOP/s of a matrix product")
    write_results(args.out, results)


if __name__ == "__main__":
    main()
