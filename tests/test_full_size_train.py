"""Two training steps on a full-size SD 1.5 folder with random weights, within 20 GB.

By hand: ``pytest -m slow -s tests/test_full_size_train.py`` prints wall time and peak memory.
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch", reason="the folder is made with torch: pip install '.[test]'")
import diffusers  # noqa: E402
import transformers  # noqa: E402
from tiny_pipelines import tiny_tokenizer  # noqa: E402
from torch_reference import SD1_SCHEDULE, SD15_UNET, SD15_VAE, TEXT_ENCODERS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LIMIT_GB = 20.0


def write_sd15(folder: Path) -> None:
    """Random weights in the published sizes, half precision on disk (2.1 GB)."""
    torch.manual_seed(0)
    text_config = transformers.CLIPTextConfig(**TEXT_ENCODERS["SD 1.5"])
    pipeline = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL.from_config(SD15_VAE),
        text_encoder=transformers.CLIPTextModel(text_config),
        tokenizer=tiny_tokenizer(folder.parent / "tokenizer", context=77),
        unet=diffusers.UNet2DConditionModel.from_config(SD15_UNET),
        scheduler=diffusers.DDIMScheduler(**SD1_SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def test_two_steps_within_20_gb(tmp_path: Path, record_property) -> None:
    write_sd15(tmp_path / "sd15")
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 256, (512, 512, 3), dtype=np.uint8)
        Image.fromarray(noise).save(photos / f"{index}.png")
    options = {
        "pretrained_model_name_or_path": tmp_path / "sd15",
        "concepts": photos,
        "base_class": "teapot",
        "output_dir": tmp_path / "out",
        "max_train_steps": 2,
        "concepts_per_device": 1,
        "num_eval_samples": 2,
        "validation_steps": "null",
        "compilation_cache_dir": "null",
    }
    command = [
        sys.executable,
        str(ROOT / "train_tpu.py"),
        *(f"{k}={v}" for k, v in options.items()),
    ]
    started = time.monotonic()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=env)
    seconds = time.monotonic() - started
    peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    record_property("peak_gb", peak_gb)
    print(f"\nSD 1.5, batch 2, float32: {seconds:.0f} s in all, peak {peak_gb:.1f} GB")  # noqa: T201
    tensors = load_file(tmp_path / "out" / "concepts" / "photos" / "catversion.safetensors")
    assert tensors["layers.11.key"].shape == (1, 12, 64)
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert peak_gb < LIMIT_GB
