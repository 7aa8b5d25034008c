"""Folders of images for the tests of what users give."""

from pathlib import Path

from PIL import Image

from catversion_jax.concepts import ConceptSpec


def put_images(folder: Path, *names: str) -> Path:
    """Small PNGs, whatever the suffix: only names matter to these tests."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name, "PNG")
    return folder


def labels(spec: ConceptSpec) -> list[str]:
    return [image.label for image in spec.images]
