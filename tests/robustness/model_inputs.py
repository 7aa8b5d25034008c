"""Models: the folders of diffusers and single files."""

import math
import shutil
from pathlib import Path

import mutations
import single_files
from inputs import MODEL, Input, library

from catversion_jax.models.stable_diffusion import load_backbone
from catversion_jax.models.weights.families import SD1
from catversion_jax.models.weights.single_file import SingleFile


def read_model(folder: Path) -> None:
    backbone = load_backbone(folder / MODEL)
    backbone.tokenizer.place("a photo of a cat", ["cat"], [1])
    assert math.isfinite(backbone.latent_scale)


MODELS = [
    Input(f"model/{file}", f"{MODEL}/{file}", (MODEL,), mutate, library(read_model))
    for file, mutate in (
        ("model_index.json", mutations.json_text),
        ("text_encoder/config.json", mutations.json_text),
        ("unet/config.json", mutations.json_text),
        ("vae/config.json", mutations.json_text),
        ("scheduler/scheduler_config.json", mutations.json_text),
        ("tokenizer/vocab.json", mutations.json_text),
        ("tokenizer/merges.txt", mutations.plain_text),
        ("tokenizer/tokenizer_config.json", mutations.json_text),
        ("unet/diffusion_pytorch_model.safetensors", mutations.safetensors),
        ("vae/diffusion_pytorch_model.safetensors", mutations.safetensors),
        ("text_encoder/model.safetensors", mutations.safetensors),
    )
]

SMALL = single_files.small(SD1)


def write_single_file(folder: Path) -> None:
    pipe = single_files.random_pipeline(SMALL, folder / "folder")
    shutil.rmtree(folder / "folder")
    single_files.single_file(
        pipe, SMALL, folder / "x.safetensors", metadata={"modelspec.prediction_type": "epsilon"}
    )


def read_single_file(folder: Path) -> None:
    SingleFile(folder / "x.safetensors")  # recognises what it is
    backbone = load_backbone(SingleFile(folder / "x.safetensors", family=SMALL))
    backbone.tokenizer.place("a photo of a cat", ["cat"], [1])


MODELS.append(
    Input(
        "model/single-file",
        "x.safetensors",
        write_single_file,
        mutations.safetensors,
        library(read_single_file),
    )
)
