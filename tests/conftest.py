"""Fixtures several test files share: a small random pipeline folder made of the real diffusers
classes.
"""

import atexit
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from random_model import byte_vocabulary

# Eight virtual devices, so that meshes are tested on any machine; must be said before jax starts
# its backend.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
# Several tests compile the same program: once is enough, for all processes of pytest -n.
_CACHE_VARIABLE = "CATVERSION_TEST_COMPILATION_CACHE"
if _CACHE_VARIABLE not in os.environ:
    os.environ[_CACHE_VARIABLE] = tempfile.mkdtemp(prefix="catversion-xla-")
    atexit.register(shutil.rmtree, os.environ[_CACHE_VARIABLE], ignore_errors=True)
COMPILATION_CACHE = os.environ[_CACHE_VARIABLE]
jax.config.update("jax_compilation_cache_dir", COMPILATION_CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# scheduler_config.json of the published SD 1.x folders, as far as it decides the noise.
SD1_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def tiny_tokenizer(folder: Path, *, context: int):
    """CLIP's tokenizer without merges: every byte is a token."""
    from transformers import CLIPTokenizer

    # from files: the constructor's arguments changed with transformers 5
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=context)


def save_tiny_sd(folder: Path, *, context: int = 24, seed: int = 0) -> Path:
    """Write a random Stable Diffusion of the real classes, 16x16 images, a few hundred kB."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = byte_vocabulary()
    tokenizer = tiny_tokenizer(folder / "tokenizer", context=context)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=context,
            projection_dim=32,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )
    # The usual 0.02 gives near-zero attention logits: make the text matter, so that a wrong mask is
    # seen.
    with torch.no_grad():
        for name, parameter in text_encoder.named_parameters():
            if "norm" not in name and parameter.ndim == 2:
                parameter.normal_(std=0.2)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    )
    scheduler = DDIMScheduler(**SD1_SCHEDULE)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline folder (do not write into it): text 4 layers x 32, context 24, latents [8 8
    4].
    """
    pytest.importorskip(
        "diffusers", reason="the tiny pipeline is built with diffusers: pip install '.[test]'"
    )
    return save_tiny_sd(tmp_path_factory.mktemp("models") / "tiny-sd")


@pytest.fixture(scope="session")
def trial_folder() -> Path:
    """The small model that really draws, beside the checkout; tests that want it are skipped
    without it.
    """
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "tiny-sd-trial"
    if not folder.is_dir():
        pytest.skip("no ../shared/data/tiny-sd-trial beside this checkout")
    return folder
