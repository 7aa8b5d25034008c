"""Single files that are no checkpoint of Stable Diffusion, each named for what it is."""

import pytest
import torch
from safetensors.torch import save_file

from catversion_jax.errors import CatVersionError
from catversion_jax.models.weights.families import SD1
from catversion_jax.models.weights.single_file import SingleFile

SD1_TEXT = SD1.text_encoders["text_encoder"].prefix
ONE = torch.zeros(1, 1)


def test_a_long_name_is_read_in_no_time(tmp_path):
    """It is an attack; a quadratic search would take days."""
    extra = {"model.diffusion_model." + "x" * 5_000_000: ONE}
    extra |= {f"{prefix}x": ONE.clone() for prefix in ("first_stage_model.", SD1_TEXT)}
    save_file(extra, tmp_path / "long.safetensors")
    with pytest.raises(CatVersionError, match="3 of its tensors have no place"):
        SingleFile(tmp_path / "long.safetensors")


OTHER_FILES = {
    "LoRA": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": ONE},
    "LoRA, which changes": {"unet.down_blocks.0.attn1.to_k.lora_A.weight": ONE},
    "embedding": {"emb_params": ONE},
    "textual-inversion embedding": {"clip_l": ONE, "clip_g": ONE.clone()},
    "concept of catversion": {"text_encoder.layers.8.key": ONE},
    "ControlNet": {"control_model.input_blocks.0.0.weight": ONE},
    "FLUX": {"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": ONE},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": ONE},
    "refiner": {"conditioner.embedders.0.model.ln_final.weight": ONE},
    "UNet out of a diffusers folder": {"down_blocks.0.resnets.0.conv1.weight": ONE},
    "text encoder out of": {"text_model.encoder.layers.0.mlp.fc1.weight": ONE},
    r"autoencoder \(VAE\) alone": {"encoder.conv_in.weight": ONE},
    "quantized": {"model.diffusion_model.out.2.weight.absmax": ONE},  # bitsandbytes
    "running mean": {"model_ema.diffusion_modelinput_blocks00weight": ONE},
    "no Stable Diffusion checkpoint": {"bert.embeddings.weight": ONE},
    "no text encoder .* and no autoencoder": {"model.diffusion_model.out.2.weight": ONE},
    r"has no autoencoder \(first_stage_model": {
        "model.diffusion_model.out.2.weight": ONE,
        "cond_stage_model.transformer.text_model.final_layer_norm.weight": ONE.clone(),
    },
}


@pytest.mark.parametrize("what", OTHER_FILES)
def test_another_kind_of_file_is_named(tmp_path, what):
    save_file(OTHER_FILES[what], tmp_path / "x.safetensors")
    with pytest.raises(CatVersionError, match=what):
        SingleFile(tmp_path / "x.safetensors")


def test_pickles_and_ggufs_are_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "model.ckpt")
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "model.ckpt").read_bytes())
    for name in ("model.ckpt", "renamed.safetensors"):
        with pytest.raises(CatVersionError, match=r"pickled checkpoint, .* \.safetensors file"):
            SingleFile(tmp_path / name)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(CatVersionError, match="quantized GGUF"):
        SingleFile(tmp_path / "model.gguf")


def test_numbers_of_eight_bits_are_named(tmp_path):
    file = tmp_path / "eight-bits.safetensors"
    save_file({"model.diffusion_model.out.2.weight": ONE.to(torch.float8_e4m3fn)}, file)
    with pytest.raises(CatVersionError, match=r"dtype F8_E4M3; .*Use the model's unquantized"):
        SingleFile(file)
