"""Commands about concept files, what they are given, and stock pipelines that run what they write:
for the tests of ``export``, ``import`` and ``inspect``.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from tiny_pipelines import make_residual, write

from catversion_jax.cli import main
from catversion_jax.integrations.diffusers import load_catversion
from catversion_jax.models.weights.fingerprint import text_encoder_sha256
from catversion_jax.models.weights.safetensors_files import open_checkpoint

LATENTS = np.random.default_rng(5).normal(size=(1, 4, 8, 8)).astype(np.float32)


def write_run(folder: Path, model: Path) -> Path:
    """A run directory with two finished concepts and one that failed."""
    facts = {
        "base_model": str(model),
        "text_encoder_sha256": text_encoder_sha256(open_checkpoint(model / "text_encoder")),
        "step": 7,
    }
    for seed, (name, word) in enumerate([("tom", "cat"), ("rex", "dog")]):
        write(folder / "concepts", name, word, make_residual(seed, bias=1.0), **facts)
    (folder / "concepts" / "broken").mkdir()
    (folder / "concepts" / "broken" / "FAILED.txt").write_text("NaN")
    return folder


def write_official(folder: Path, width: int = 32, positions: int = 2) -> torch.Tensor:
    """An adapter as the authors' code saves it; the numbers of each of its two layers."""
    flat = torch.randn(positions * 4 * width)
    folder.mkdir()
    keys = [f"text_model.encoder.layers.{i}.self_attn.prefix_tuning.control_trans" for i in (2, 3)]
    torch.save({key: flat for key in keys}, folder / "pytorch_adapter.bin")
    adapter_config = {"config": {"prefix_length": positions}, "hidden_size": width}
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config))
    return flat


def catversion(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Run a command here; its exit code and what it printed."""
    code = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def stock_pipe(folder: Path):
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompt: str | None = "a cat", **kwargs) -> np.ndarray:
    kwargs |= {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}
    return pipe(prompt, latents=torch.tensor(LATENTS), **kwargs).images[0]


def draw_with_loader(folder: Path, concept: Path, prompt: str, **kwargs) -> np.ndarray:
    pipe = stock_pipe(folder)
    load_catversion(pipe, concept)
    return draw(pipe, prompt, **kwargs)
