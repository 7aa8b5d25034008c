"""What the training stages share: one loop with a cosine schedule, weight averaging and resuming.

Every stage is written in torch: on the two CPU cores it was made for, torch's convolutions ran the
UNet 2.0 and the VAE 2.7 times as fast as XLA's (``benchmark.py``). A stage's randomness is a
function of (seed, step, worker), so a stopped run continues as if it had not stopped, except that
``--minutes`` follows the clock. ``torchrun --nproc-per-node 2`` trains with one single-thread
worker a core. ``--device cuda`` trains the same on a GPU, and ``--loaders`` processes prepare
batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import multiprocessing.pool
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch

Model = TypeVar("Model", bound=torch.nn.Module)
T = TypeVar("T")

logger = logging.getLogger(__name__)
SAVE_SECONDS = 180.0
Loss = tuple[torch.Tensor, dict[str, float | torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The random generators of one step on one worker."""

    step: int
    numpy: np.random.Generator
    python: random.Random
    torch: torch.Generator


def arguments(description: str | None, **defaults: float | str) -> argparse.Namespace:
    """The options of a training stage."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", type=Path)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--minutes", type=float, help="how long to train, instead of --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loaders", type=int, default=0, help="processes that prepare batches")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device != "cpu":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo" if args.device == "cpu" else "nccl")
    return args


def rank() -> int:
    """Number of this worker."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def train(
    name: str,
    model: Model,
    loss_fn: Callable[[Batch], Loss],
    args: argparse.Namespace,
    *,
    weight_decay: float = 0.01,
    decay: float = 0.998,
    betas: tuple[float, float] = (0.9, 0.99),
) -> Model:
    """Train (AdamW, warm-up, cosine to 5 %) and return the averaged model.

    ``args.steps`` updates, or for ``args.minutes`` where those are given. ``WORK/name.pt`` holds
    everything needed to continue, ``WORK/name.ema.pt`` the average; both are written every
    ``SAVE_SECONDS``. A run continued with fewer ``--steps`` or ``--minutes`` anneals earlier. The
    first run of a stage begins with ``WORK/name.start.pt``, weights of an earlier sitting, where
    there is one.
    """
    path, device = args.work / f"{name}.pt", torch.device(args.device)
    start = args.work / f"{name}.start.pt"
    if start.exists():
        model.load_state_dict(torch.load(start, map_location="cpu"))
    model.to(device)
    params = [p for p in model.parameters() if p.requires_grad]
    if device.type != "cpu" or getattr(args, "compile", False):
        # bfloat16 convolutions of a GPU and compiled ones want channels last
        for kernel in (p for p in params if p.dim() == 4):
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    tx = torch.optim.AdamW(params, lr=args.lr, betas=betas, weight_decay=weight_decay, fused=True)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    step, earlier = 0, 0.0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=False)
        model.load_state_dict(saved["model"])
        tx.load_state_dict(saved["tx"])
        average, step, earlier = saved["average"], saved["step"], saved["seconds"]
        logger.info("%s: continued at step %d", name, step)
    model.train()
    started, first = time.perf_counter(), step
    saved_at, seconds = started, earlier
    while (done := _progress(step, seconds, args)) < 1:
        for group in tx.param_groups:
            group["lr"] = args.lr * schedule(step, done)
        loss, report = loss_fn(generators(args.seed, step, rank(), device))
        loss.backward()
        _average_gradients(params)
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        if torch.isfinite(norm):
            tx.step()
        tx.zero_grad(set_to_none=True)
        step += 1
        _move_average(average, model, min(decay, (1 + step) / (10 + step)))
        now = time.perf_counter()
        seconds = earlier + now - started
        last = _progress(step, seconds, args) >= 1
        if rank() == 0 and (step % 100 == 0 or last):
            rate = (step - first) / (now - started)
            values = " ".join(f"{k} {float(v):.4f}" for k, v in report.items())
            logger.info("%s %d: %s (%.2f steps/s)", name, step, values, rate)
        if rank() == 0 and (now - saved_at > SAVE_SECONDS or last):
            saved_at = now
            state = {"model": model.state_dict(), "tx": tx.state_dict(), "average": average}
            _save(path, {**state, "step": step, "seconds": seconds})
            _save(path.with_suffix(".ema.pt"), average)
    logger.info("%s: %d steps of %d samples a worker", name, step, args.batch)
    model.load_state_dict(average)
    return model.eval()


def _progress(step: int, seconds: float, args: argparse.Namespace) -> float:
    """How much of the run is done, in [0, 1]; the first worker's clock counts for all."""
    if args.minutes is None:
        return step / args.steps
    done = torch.tensor(seconds / (60 * args.minutes), dtype=torch.float64)
    if torch.distributed.is_initialized():
        done = done.to(args.device)
        torch.distributed.broadcast(done, 0)
    return float(done)


def _move_average(average: dict[str, torch.Tensor], model: torch.nn.Module, kept: float) -> None:
    with torch.no_grad():
        values = model.state_dict()
        floats = [key for key, value in values.items() if value.dtype.is_floating_point]
        torch._foreach_lerp_([average[k] for k in floats], [values[k] for k in floats], 1 - kept)
        for key in values.keys() - floats:
            average[key].copy_(values[key])


class Prepared(Generic[T]):
    """What a function of the step returns, computed ahead by ``loaders`` processes.

    With no processes it is computed when it is asked for; the values are the same.
    """

    def __init__(self, prepare: Callable[[int], T], loaders: int):
        self._prepare, self._ahead = prepare, 4 * loaders
        self._waiting: dict[int, multiprocessing.pool.AsyncResult] = {}
        self._pool = None
        if loaders:
            # forked, so that nothing that prepare holds needs to be sent
            global _PREPARE
            _PREPARE = prepare
            self._pool = multiprocessing.get_context("fork").Pool(loaders)

    def __call__(self, step: int) -> T:
        """The value of one step; steps are asked for in order."""
        if self._pool is None:
            return self._prepare(step)
        for number in range(step, step + self._ahead):
            if number not in self._waiting:
                self._waiting[number] = self._pool.apply_async(_run_prepare, (number,))
        return self._waiting.pop(step).get()


_PREPARE: Callable[[int], object] | None = None


def _run_prepare(step: int) -> object:
    assert _PREPARE is not None
    return _PREPARE(step)


def schedule(step: int, done: float, warmup: int = 200) -> float:
    """Linear warm-up over the first steps, then a cosine from 1 to 0.05 of the learning rate."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1)))
    return min((step + 1) / warmup, 1) * (0.05 + 0.95 * cosine)


def load_average(work: Path, name: str, model: Model) -> Model:
    """The averaged weights of a stage, frozen; those it would begin with if it was not run."""
    path = work / f"{name}.ema.pt"
    if not path.exists():
        path = work / f"{name}.start.pt"
    model.load_state_dict(torch.load(path, map_location="cpu"))
    return model.eval().requires_grad_(False)


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """``[B H W 3]`` uint8 to ``[B 3 H W]`` in [-1, 1], computed where it is wanted."""
    tensor = torch.from_numpy(np.array(images)).to(device)
    return (tensor.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()


def in_bfloat16(device: str) -> torch.autocast:
    """Where networks run in bfloat16 over float32 weights, if the device computes in it."""
    kind = torch.device(device).type
    capabilities = torch.cpu.get_capabilities() if kind == "cpu" else {"amx_bf16": True}
    fast = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
    return torch.autocast(kind, torch.bfloat16, enabled=fast)


def generators(seed: int, step: int, worker: int, device: torch.device | str = "cpu") -> Batch:
    """The randomness of one step on one worker, the same whenever it is asked for."""
    key = (seed * 1_000_003 + step) * 64 + worker
    generator = torch.Generator(device).manual_seed(key)
    return Batch(step, np.random.default_rng(key), random.Random(key), generator)


def _average_gradients(params: list[torch.nn.Parameter]) -> None:
    if not torch.distributed.is_initialized():
        return
    gradients = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _save(path: Path, state: dict) -> None:
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
