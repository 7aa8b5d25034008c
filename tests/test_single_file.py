"""Single-file checkpoints against diffusers: the same file gives the same tensors."""

import copy
import dataclasses
import functools
import json
import shutil
import struct
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import load_file, save_file
from single_files import (
    original_state_dict,
    random_parts,
    random_pipeline,
    single_file,
    small,
)

from catversion_jax.cli import main
from catversion_jax.errors import CatVersionError
from catversion_jax.integrations.diffusers import load_catversion
from catversion_jax.integrations.pipeline_folder import export_pipeline
from catversion_jax.methods.concept_file import load_concept, save_concept
from catversion_jax.methods.residual import KVResidual
from catversion_jax.models.stable_diffusion import (
    abstract_backbone,
    check_weights,
    load_backbone,
    model_resolution,
)
from catversion_jax.models.weights.families import FAMILIES, SD1, SD2, SDXL
from catversion_jax.models.weights.fingerprint import text_encoder_sha256
from catversion_jax.models.weights.model_files import open_model
from catversion_jax.models.weights.safetensors_files import open_checkpoint
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
            np.testing.assert_array_equal(read, tensor.numpy(), key)


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
            read = np.asarray(ours.tensors(component)[key])
            np.testing.assert_array_equal(read, tensor.float().numpy(), key)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_full_size_has_its_place(name, tmp_path):
    family = BY_NAME[name]
    with torch.device("meta"):
        parts = random_parts(family)
    state = original_state_dict(types.SimpleNamespace(**parts), family)
    header, end = {}, 0
    for key, tensor in state.items():
        size = 2 * tensor.numel()
        header[key] = {
            "dtype": "F16",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    file = tmp_path / "full.safetensors"
    with file.open("wb") as stream:  # the numbers are a hole that takes no room
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    ours = SingleFile(file)
    assert ours.family is family
    for component in family.configs:
        shapes = {k: tuple(v.shape) for k, v in state_of(parts[component]).items()}
        assert {k: v.shape for k, v in ours.tensors(component).items()} == shapes


@pytest.mark.parametrize("name", [SD1.name, SDXL.name])
def test_the_model_is_the_one_of_the_folder(made, name):
    family, _, folder, file = made(name)
    ours = load_backbone(SingleFile(file, family=family))
    theirs = load_backbone(folder)
    for mine, expected in zip(
        (*ours.text_encoders, ours.unet, ours.vae),
        (*theirs.text_encoders, theirs.unet, theirs.vae),
        strict=True,
    ):
        assert mine.graphdef == expected.graphdef
        assert jax.tree.structure(mine.params) == jax.tree.structure(expected.params)
        for a, b in zip(
            jax.tree.leaves(mine.params), jax.tree.leaves(expected.params), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert ours.text_facts == theirs.text_facts
    assert ours.zeros_for_empty_prompt == theirs.zeros_for_empty_prompt == (name == SDXL.name)
    # diffusers wrote its scheduler's own spacing, which the published files leave open
    schedules = (ours.noise_schedule, theirs.noise_schedule)
    mine, expected = (dataclasses.replace(one, timestep_spacing=None) for one in schedules)
    assert mine == expected
    assert (ours.latent_scale, ours.default_resolution) == (
        theirs.latent_scale,
        theirs.default_resolution,
    )
    prompts = ["a cat", "two dogs!"]
    for mine, expected in zip(ours.tokenizers, theirs.tokenizers, strict=True):
        np.testing.assert_array_equal(mine(prompts), expected(prompts))


def test_a_missing_tensor_is_named(made, tmp_path):
    family, _, _, file = made(SD1.name)
    state = load_file(file)
    del state["model.diffusion_model.middle_block.1.norm.weight"]
    save_file(state, tmp_path / "short.safetensors")
    with pytest.raises(CatVersionError, match=r"1 missing:\n  mid_block.attentions.0.norm.weight"):
        load_backbone(SingleFile(tmp_path / "short.safetensors", family=family))


def test_a_file_is_a_model_wherever_one_is_named(made):
    _, _, _, file = made(SD1.name)
    backbone = abstract_backbone(str(file))
    assert (backbone.name, backbone.folder) == (str(file), file)
    assert (backbone.default_resolution, backbone.num_text_layers) == (512, 12)
    _, _, _, file = made(SD2.name)
    assert model_resolution(open_model(file)) == 768
    assert model_resolution(open_model(file, prediction_type="epsilon")) == 512


def test_check_reads_words_and_resolution_of_a_file(made, tmp_path, capsys):
    file = made(SD2.name)[-1]
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (600, 600, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "concept.json").write_text(json.dumps({"base_class": "x " * 75 + "x"}))
    for given, smaller in (((), True), (("--prediction_type", "epsilon"), False)):
        main(["check", str(tmp_path), "--model", str(file), *given])
        text = capsys.readouterr().out
        assert "has 76 tokens, the model reads only 75" in text
        assert ("smaller than 768" in text) == smaller


def test_an_imported_concept_states_the_fingerprint_of_a_file(made, tmp_path):
    """The file holds a small model, but no configuration says so: it counts as a usual one."""
    _, _, folder, file = made(SD1.name)
    adapter = Path(__file__).parent / "data" / "official_adapters" / "teddybear"
    arguments = ("--base_class", "bear", "--model", str(file), "--output_dir", str(tmp_path))
    assert main(["import", str(adapter), *arguments]) == 0
    expected = text_encoder_sha256(open_checkpoint(folder / "text_encoder"))
    assert load_concept(tmp_path / "teddybear").text_encoder_sha256 == expected


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_draws_the_same_from_the_folder_that_is_written(made, tmp_path, name):
    family, pipe, _, file = made(name)
    SingleFile(file, family=family).save_to(tmp_path / "folder")
    kind = StableDiffusionXLPipeline if family.name == SDXL.name else StableDiffusionPipeline
    written = kind.from_pretrained(tmp_path / "folder", local_files_only=True)
    for component in family.configs:
        theirs = getattr(pipe, component).state_dict()
        ours = getattr(written, component).state_dict()
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), f"{component} {key}"
    images = [
        each(
            "a photo of 2 cats",
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        for each in (pipe, written)
    ]
    assert np.isfinite(images[0]).all()
    np.testing.assert_allclose(*images, atol=1e-3)  # alignment in memory changes last digits


def test_a_pipeline_with_concepts_is_exported_from_a_file(made, tmp_path, capsys):
    family, pipe, _, file = made(SD1.name)
    numbers = np.random.default_rng(0).normal(size=(2, 1, 1, 2, 8)).astype(np.float32)
    sha256 = text_encoder_sha256(SingleFile(file).tensors("text_encoder"))
    concept = save_concept(
        tmp_path / "cat.safetensors",
        KVResidual(*numbers, (1,)),
        base_class="cat",
        name="tom",
        base_model=str(file),
        text_encoder_sha256=sha256,
    )
    output = tmp_path / "out"
    arguments = ("--format", "pipeline", "--output_dir", str(output))
    assert main(["export", str(concept), *arguments]) == 2  # too small for what the file counts as
    assert "the weights do not fit the configuration" in capsys.readouterr().err
    small = SingleFile(file, family=family)
    check_weights(small)
    assert export_pipeline(output, small, [load_concept(concept)]) == output
    index = json.loads((output / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "CatVersionPipeline"]
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    stored = load_file(output / "text_encoder" / "model.safetensors")
    for key, tensor in state_of(pipe.text_encoder).items():
        assert torch.equal(stored[f"text_model.{key}"], tensor), key
    # the loader finds the file that the concept was trained with, and compares
    tuned = copy.copy(pipe)
    tuned.text_encoder = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        state_of(tuned.text_encoder)["final_layer_norm.weight"].add_(1)
    with pytest.warns(UserWarning, match=r"a fine-tuned text encoder, \S+ % of numbers changed"):
        load_catversion(tuned, concept)


def test_what_a_file_cannot_be_is_said(made):
    _, _, folder, file = made(SD1.name)
    with pytest.raises(CatVersionError, match="is a single file, which has none"):
        open_model(file, variant="fp16")
    with pytest.raises(CatVersionError, match="says 'epsilon', and a folder knows"):
        open_model(folder, prediction_type="v_prediction")


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
    assert "2 of its tensors have no place in a Stable Diffusion 1.x" in str(error.value)
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
        SingleFile(file).scheduler_config()
    with pytest.raises(CatVersionError, match="must be one of epsilon, v_prediction"):
        SingleFile(file, prediction_type="velocity").scheduler_config()


def test_what_no_network_reads_may_be_there(made, tmp_path):
    family, pipe, _, _ = made(SD1.name)
    unread = (  # as the original training, kohya and ComfyUI leave it
        "sqrt_one_minus_alphas_cumprod",
        "posterior_mean_coef1",
        "model_ema.diffusion_modelout2weight",
        "first_stage_model.model_ema.decay",
        "first_stage_model.loss.discriminator.main.0.weight",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "cond_stage_model.transformer.text_projection.weight",
        "cond_stage_model.logit_scale",
        "embedding_manager.placeholder",
    )
    extra = {name: torch.zeros(2) for name in unread}
    file = single_file(pipe, family, tmp_path / "unread.safetensors", extra=extra)
    found = SingleFile(file, family=family)
    assert found.tensors("text_encoder").keys() == state_of(pipe.text_encoder).keys()
    assert found.tensors("unet").keys() == pipe.unet.state_dict().keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizers_are_those_of_the_folder(made, name):
    family, pipe, _, file = made(name)
    ours = SingleFile(file, family=family)
    prompts = ["a photo of a cat", "déjà vu, 3 KITTENS on a surfboard", ""]
    for component in family.text_encoders:
        theirs = getattr(pipe, component.replace("text_encoder", "tokenizer"))
        rows = theirs(prompts, padding="max_length", max_length=77)["input_ids"]
        assert ours.tokenizer(component)(prompts).tolist() == rows
