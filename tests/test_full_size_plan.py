"""The plan of Stable Diffusion 1.5 for a TPU slice, from its published configuration alone."""

import json
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="the folder is made with torch: pip install '.[test]'")
pytest.importorskip("libtpu", reason="the TPU compiler: pip install 'catversion-jax[plan]'")
import diffusers  # noqa: E402
import transformers  # noqa: E402
from tiny_pipelines import tiny_tokenizer  # noqa: E402
from torch_reference import (  # noqa: E402
    SD1_SCHEDULE,
    SD15_UNET,
    SD15_VAE,
    SDXL_SCHEDULE,
    SDXL_TEXT_ENCODER_2,
    SDXL_UNET,
    SDXL_VAE,
    TEXT_ENCODERS,
)

from catversion_jax.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def write_sd15_configs(folder: Path) -> None:
    """Everything but weights."""
    tiny_tokenizer(folder / "tokenizer", context=77).save_pretrained(folder / "tokenizer")
    with torch.device("meta"):
        diffusers.UNet2DConditionModel.from_config(SD15_UNET).save_config(folder / "unet")
        diffusers.AutoencoderKL.from_config(SD15_VAE).save_config(folder / "vae")
    diffusers.DDIMScheduler(**SD1_SCHEDULE).save_config(folder / "scheduler")
    transformers.CLIPTextConfig(**TEXT_ENCODERS["SD 1.5"]).save_pretrained(folder / "text_encoder")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def write_sdxl_configs(folder: Path) -> None:
    """Everything of Stable Diffusion XL but weights."""
    for name in ("tokenizer", "tokenizer_2"):
        tiny_tokenizer(folder / name, context=77).save_pretrained(folder / name)
    with torch.device("meta"):
        diffusers.UNet2DConditionModel.from_config(SDXL_UNET).save_config(folder / "unet")
        diffusers.AutoencoderKL.from_config(SDXL_VAE).save_config(folder / "vae")
    diffusers.EulerDiscreteScheduler(**SDXL_SCHEDULE).save_config(folder / "scheduler")
    configs = {"text_encoder": TEXT_ENCODERS["SD 1.5"], "text_encoder_2": SDXL_TEXT_ENCODER_2}
    for name, config in configs.items():
        transformers.CLIPTextConfig(**config).save_pretrained(folder / name)
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True}
    kinds = {
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index | kinds))


def test_the_plan_of_sd15_takes_less_than_ten_minutes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sd15_configs(tmp_path / "sd15")
    arguments = ["plan", "--config", str(ROOT / "configs" / "sd15.yaml"), "--tpu", "v5e:4x4"]
    arguments += [f"pretrained_model_name_or_path={tmp_path / 'sd15'}", "--concepts", "10000"]
    started = time.monotonic()
    assert main([*arguments, "--price-per-chip-hour", "1.2", "--json"]) == 0
    assert time.monotonic() - started < 600
    plan = json.loads(capsys.readouterr().out)
    assert plan["collectives"] == {}
    assert plan["largest_concepts_per_device"] >= 1
    # the UNet alone: 1,670 GFLOP per sample at least, two samples a step
    assert plan["flops_per_concept_step"] > 2 * 1.67e12
