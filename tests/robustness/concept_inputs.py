"""Concepts: their folders, photos, masks and manifests."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import mutations
import numpy as np
from inputs import Input, command, library, picture
from PIL import Image

from catversion_jax.concepts import read_concepts
from catversion_jax.concepts.images import load_image
from catversion_jax.errors import CatVersionError


def write_concepts(folder: Path, *, count: int = 2) -> None:
    for name in ("pot", "cat")[:count]:
        concept = folder / "concepts" / name
        concept.mkdir(parents=True)
        said = {
            "base_class": name,
            "instance_prompt": ["a {}", "a photo of a {}"],
            "seed": 3,
            "when": "class_word",
            "class_forms": [f"{name}s"],
        }
        (concept / "concept.json").write_text(json.dumps(said))
        for index in range(2):
            picture(index).save(concept / f"{index}.png")
    disk = np.zeros((24, 24), np.uint8)
    disk[6:18, 6:18] = 255
    Image.fromarray(disk).save(folder / "concepts" / "pot" / "0.mask.png")


def write_manifest(folder: Path, name: str, text: str) -> None:
    write_concepts(folder)
    (folder / "concepts" / name).write_text(text)


MANIFEST_ROWS = [
    {"name": "pot", "base_class": "pot", "images": ["pot/0.png", "pot/1.png"]},
    {"name": "cat", "base_class": "cat", "images": ["cat/0.png"], "seed": 5, "prompts": ["a {}"]},
]


def read_all(source: Path) -> None:
    """What training does before it needs a model: find concepts, decode photos and masks."""
    found = read_concepts(str(source))
    for spec in found.concepts:
        for image in spec.images:
            with contextlib.suppress(CatVersionError):  # quarantines the concept
                loaded = load_image(image, resolution=16)
                assert np.isfinite(loaded.pixels).all()
                assert loaded.pixels.shape == (16, 16, 3)


def check(name: str = "") -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        outcome = command("check", folder / "concepts" / name)
        library(lambda found: read_all(found / "concepts" / name))(folder)
        return outcome

    return read


def save_as(name: str, **options: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_concepts(folder)
        picture(9).save(folder / "concepts" / "pot" / name, **options)

    return write


CONCEPTS = [
    Input(
        "concept.json", "concepts/pot/concept.json", write_concepts, mutations.json_text, check()
    ),
    Input("photo.png", "concepts/pot/0.png", write_concepts, mutations.png, check()),
    Input("mask.png", "concepts/pot/0.mask.png", write_concepts, mutations.png, check()),
    *(
        Input(name, f"concepts/pot/{name}", save_as(name, **options), mutations.damaged, check())
        for name, options in (
            ("photo.jpg", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
            ("photo.webp", {"lossless": True}),
            ("photo.gif", {"save_all": True, "append_images": [picture(1)]}),
            ("photo.tiff", {}),
            ("photo.bmp", {}),
        )
    ),
    Input(
        "manifest.jsonl",
        "concepts/list.jsonl",
        lambda folder: write_manifest(
            folder, "list.jsonl", "\n".join(json.dumps(row) for row in MANIFEST_ROWS)
        ),
        mutations.lines_of_json,
        check("list.jsonl"),
    ),
    Input(
        "manifest.yaml",
        "concepts/list.yaml",
        lambda folder: write_manifest(folder, "list.yaml", json.dumps(MANIFEST_ROWS)),
        mutations.yaml_text,
        check("list.yaml"),
    ),
    Input(
        "manifest.csv",
        "concepts/list.csv",
        lambda folder: write_manifest(
            folder, "list.csv", "name,base_class,path\npot,pot,pot\ncat,cat,cat\n"
        ),
        mutations.table,
        check("list.csv"),
    ),
    Input(
        "metadata.jsonl",
        "concepts/pot/metadata.jsonl",
        lambda folder: write_manifest(
            folder,
            "pot/metadata.jsonl",
            '{"file_name": "0.png", "text": "a pot"}\n{"file_name": "1.png", "text": "a pot"}',
        ),
        mutations.lines_of_json,
        check(),
    ),
]
