"""Single-file checkpoints against diffusers: the same file gives the same tensors."""

import functools
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file
from single_files import random_pipeline, single_file, small

from catversion_jax.errors import CatVersionError
from catversion_jax.models.weights.families import FAMILIES, SD1, SD2, SDXL
from catversion_jax.models.weights.single_file import SingleFile

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
NAMES = [family.name for family in FAMILIES]
BY_NAME = dict(zip(NAMES, FAMILIES, strict=True))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pipeline, its folder and its single file, of a family; made when first asked for."""

    @functools.cache
    def make(name):
        family = small(BY_NAME[name])
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        pipe = random_pipeline(family, folder / "folder")
        metadata = {"modelspec.prediction_type": "v"} if family.name == SD2.name else None
        file = single_file(pipe, family, folder / "model.safetensors", metadata=metadata)
        return family, pipe, folder / "folder", file

    return make


def state_of(module):
    return {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_the_inverse_of_diffusers_own_conversion(made, name):
    _, pipe, _, file = made(name)
    stored = load_file(file)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(stored), dict(pipe.unet.config))
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(stored), dict(pipe.vae.config))
    for converted, module in ((unet, pipe.unet), (vae, pipe.vae)):
        state = module.state_dict()
        assert converted.keys() == state.keys()
        for key, tensor in state.items():
            assert torch.equal(converted[key].reshape(tensor.shape), tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_models_own(made, name):
    family, pipe, _, file = made(name)
    ours = SingleFile(file, family=family)
    for component in family.configs:
        expected = state_of(getattr(pipe, component))
        tensors = ours.tensors(component)
        assert tensors.keys() == expected.keys(), component
        for key, tensor in expected.items():
            read = np.asarray(tensors[key])
            assert read.shape == tensors[key].shape
            np.testing.assert_array_equal(read.reshape(tensor.shape), tensor.numpy(), key)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_reads_the_same_tensors_from_the_file(made, name, tmp_path):
    family, _, whole, file = made(name)
    folder = tmp_path / "configs"  # so that no weight can come from there
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    kind = StableDiffusionXLPipeline if family.name == SDXL.name else StableDiffusionPipeline
    pipe = kind.from_single_file(file, config=str(folder), local_files_only=True)
    ours = SingleFile(file, family=family)
    for component in family.configs:
        for key, tensor in state_of(getattr(pipe, component)).items():
            read = np.asarray(ours.tensors(component)[key]).reshape(tensor.shape)
            np.testing.assert_array_equal(read, tensor.float().numpy(), key)


@pytest.mark.parametrize("name", NAMES)
def test_the_family_is_recognised_from_the_names(made, name):
    _, _, _, file = made(name)
    assert SingleFile(file).family is BY_NAME[name]


def test_tensors_without_a_place_are_listed(made, tmp_path):
    family, pipe, _, _ = made(SD1.name)
    strange = {
        "model.diffusion_model.input_blocks.99.0.op.weight": torch.zeros(1),
        "cond_stage_model.adapter.weight": torch.zeros(1),
    }
    file = single_file(pipe, family, tmp_path / "strange.safetensors", extra=strange)
    with pytest.raises(CatVersionError) as error:
        SingleFile(file, family=family)
    assert "2 tensors have no place in a Stable Diffusion 1.x" in str(error.value)
    assert all(name in str(error.value) for name in strange)


@pytest.mark.parametrize(
    ("extra", "metadata", "given", "expected", "zero_snr"),
    [
        ({}, {"modelspec.prediction_type": "epsilon"}, None, "epsilon", False),
        ({}, {"modelspec.prediction_type": "v"}, None, "v_prediction", False),
        ({"v_pred": torch.zeros(0)}, None, None, "v_prediction", False),
        ({"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, None, None, "v_prediction", True),
        ({"v_pred": torch.zeros(0)}, None, "epsilon", "epsilon", False),
    ],
)
def test_the_prediction_type_is_what_user_or_file_says(
    made, tmp_path, extra, metadata, given, expected, zero_snr
):
    family, pipe, _, _ = made(SD2.name)
    file = single_file(pipe, family, tmp_path / "v.safetensors", extra=extra, metadata=metadata)
    scheduler = SingleFile(file, family=family, prediction_type=given).scheduler_config()
    assert scheduler["prediction_type"] == expected
    assert scheduler.get("rescale_betas_zero_snr", False) == zero_snr


def test_a_silent_file_of_sd2_asks_for_the_prediction_type(made, tmp_path):
    family, pipe, _, _ = made(SD2.name)
    file = single_file(pipe, family, tmp_path / "silent.safetensors")
    with pytest.raises(CatVersionError, match=r"prediction_type=epsilon or prediction_type=v_pre"):
        SingleFile(file)
    with pytest.raises(CatVersionError, match="must be one of epsilon, v_prediction"):
        SingleFile(file, prediction_type="velocity")


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizers_are_those_of_the_folder(made, name):
    family, pipe, _, file = made(name)
    ours = SingleFile(file, family=family)
    prompts = ["a photo of a cat", "déjà vu, 3 KITTENS on a surfboard", ""]
    for component in family.text_encoders:
        theirs = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        rows = theirs(prompts, padding="max_length", max_length=77)["input_ids"]
        assert ours.tokenizer(component)(prompts).tolist() == rows


ONE = torch.zeros(1, 1)
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
