"""What is asked for: options, prompts, latents, and images to evaluate."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
from inputs import Input, library, picture
from PIL.PngImagePlugin import PngInfo

from catversion_jax.cli.generate import _read_latents
from catversion_jax.cli.prompt_files import read_prompts
from catversion_jax.config import load_config
from catversion_jax.evaluation import load_prompt_set
from catversion_jax.evaluation.image_folders import find_images, read_mask, read_pixels


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return write


CONFIG = {
    "concepts": "concepts",
    "output_dir": "out",
    "learning_rate": 0.01,
    "max_train_steps": 100,
    "layers": "last3",
    "instance_prompt": "a {}",
    "random_flip": 0.5,
    "seed": 3,
}
PROMPT_ROWS = [{"prompt": "a cat", "seed": 3}, {"prompt": "a dog", "concepts": ["dog"]}]


def _array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((1, 4, 8, 8), np.float32))
    return file.getvalue()


def write_images(folder: Path) -> None:
    said = PngInfo()
    said.add_text("parameters", json.dumps({"prompt": "a pot in the snow", "seed": 0}))
    (folder / "images").mkdir()
    picture(0).save(folder / "images" / "some.png", pnginfo=said)
    picture(1).save(folder / "images" / "a-pot-in-the-snow_1.png")
    picture(2, "L").save(folder / "images" / "a-pot-in-the-snow_1.mask.png")
    (folder / "set.yaml").write_text('prompts: ["a {} in the snow"]')


def read_images(folder: Path) -> None:
    prompts = load_prompt_set(str(folder / "set.yaml")).of("pot")
    for image in find_images(folder / "images", prompts, "pot")[0]:
        read_pixels(image.path)
        read_mask(image.path)


ASKED = [
    Input(
        "config.yaml",
        "config.yaml",
        written("config.yaml", json.dumps(CONFIG)),
        mutations.yaml_text,
        library(lambda folder: load_config(folder / "config.yaml")),
    ),
    Input(
        "options",
        "options.txt",
        written("options.txt", "concepts=concepts\nlearning_rate=0.1"),
        mutations.assignments,
        library(
            lambda folder: load_config(
                overrides=(folder / "options.txt").read_text("utf-8", "surrogateescape").split("\n")
            )
        ),
    ),
    Input(
        "prompts.txt",
        "prompts.txt",
        written("prompts.txt", "a cat\na dog\n"),
        mutations.plain_text,
        library(lambda folder: read_prompts(folder / "prompts.txt")),
    ),
    Input(
        "prompts.jsonl",
        "prompts.jsonl",
        written("prompts.jsonl", "\n".join(json.dumps(row) for row in PROMPT_ROWS)),
        mutations.lines_of_json,
        library(lambda folder: read_prompts(folder / "prompts.jsonl")),
    ),
    Input(
        "prompts.yaml",
        "prompts.yaml",
        written("prompts.yaml", json.dumps(PROMPT_ROWS)),
        mutations.yaml_text,
        library(lambda folder: read_prompts(folder / "prompts.yaml")),
    ),
    Input(
        "prompt_set.yaml",
        "set.yaml",
        written("set.yaml", json.dumps({"prompts": ["a {} in snow"], "num_images_per_prompt": 2})),
        mutations.yaml_text,
        library(lambda folder: load_prompt_set(str(folder / "set.yaml"))),
    ),
    Input(
        "latents.npy",
        "latents.npy",
        written("latents.npy", _array()),
        mutations.npy,
        library(lambda folder: _read_latents(folder / "latents.npy")),
    ),
    Input("generated.png", "images/some.png", write_images, mutations.png, library(read_images)),
    Input(
        "generated.mask.png",
        "images/a-pot-in-the-snow_1.mask.png",
        write_images,
        mutations.png,
        library(read_images),
    ),
]
