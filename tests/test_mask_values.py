"""Masks in the dialects of other programs, against the shape that was drawn into each."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from catversion_jax.concepts import ImageSource
from catversion_jax.concepts.folders import MaskPolarity
from catversion_jax.concepts.images import decode_mask, decode_upright, load_image

SIDE = 32


@pytest.fixture
def drawn() -> np.ndarray:
    """A disc: True on the object."""
    image = Image.new("1", (SIDE, SIDE))
    ImageDraw.Draw(image).ellipse((6, 9, 24, 27), fill=1)
    return np.asarray(image)


def photo() -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def source(path: Path, polarity: MaskPolarity | None = None) -> ImageSource:
    return ImageSource("photo", data=photo(), mask=path, mask_polarity=polarity)


def with_palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "L").convert("L")
    image.putpalette([level for colour in colours for level in colour])
    return image


def cut_out(drawn: np.ndarray, colour: int) -> Image.Image:
    rgba = np.full((SIDE, SIDE, 4), colour, np.uint8)
    rgba[..., 3] = drawn * 255
    return Image.fromarray(rgba)


def grey(values: np.ndarray, kind: type = np.uint8) -> Image.Image:
    return Image.fromarray(values.astype(kind))


DIALECTS = {
    "black and white": lambda d: grey(d * 255),
    "zero and one": lambda d: grey(d * 1),
    "one bit": lambda d: Image.fromarray(d),
    "class number of a label map": lambda d: grey(d * 7),
    "16 bits": lambda d: grey(d * 65535, np.uint16),
    "16 bits, zero and one": lambda d: grey(d * 1, np.uint16),
    "floats": lambda d: grey(d * 1.0, np.float32),
    "red on black": lambda d: Image.fromarray((d[..., None] * [200, 0, 0]).astype(np.uint8)),
    "palette of labels": lambda d: with_palette(d * 1, (0, 0, 0), (128, 0, 0)),
    "palette without black": lambda d: with_palette(d * 1, (68, 1, 84), (253, 231, 37)),
    "palette of two labels": lambda d: with_palette(
        d * (1 + np.indices(d.shape)[0] % 2), (0, 0, 0), (0, 0, 1), (9, 9, 0)
    ),
    "palette with black last": lambda d: with_palette(1 - d, (255, 0, 0), (0, 0, 0)),
    "black and white with a palette": lambda d: with_palette(1 - d, (255, 255, 255), (0, 0, 0)),
    "bright cut-out": lambda d: cut_out(d, 255),
    "dark cut-out": lambda d: cut_out(d, 3),
    "cut-out with a palette": lambda d: cut_out(d, 90).quantize(),
    "opaque RGBA": lambda d: grey(d * 255).convert("RGBA"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_gives_the_drawn_shape(
    dialect: str, drawn: np.ndarray, tmp_path: Path
) -> None:
    kind = "TIFF" if dialect == "floats" else "PNG"
    DIALECTS[dialect](drawn).save(tmp_path / "mask", kind)
    mask = decode_mask(source(tmp_path / "mask"))
    assert mask is not None
    np.testing.assert_array_equal(np.asarray(mask.grey), drawn * 255)
    assert mask.fault is None
    loaded = load_image(source(tmp_path / "mask"), resolution=SIDE)
    np.testing.assert_array_equal(loaded.mask, drawn.astype(np.float32))


def test_grey_stays_grey(drawn: np.ndarray, tmp_path: Path) -> None:
    values = np.where(drawn, np.arange(SIDE) * 8, 0)
    grey(values).save(tmp_path / "mask.png")
    mask = decode_mask(source(tmp_path / "mask.png"))
    assert mask is not None
    np.testing.assert_array_equal(np.asarray(mask.grey), values)


FAULTS = {
    "is empty": lambda d: d * 0,
    "is never white: its brightest grey is 48 of 255": lambda d: d * np.arange(SIDE) * 2,
    "is nearly empty: 0.098 %": lambda d: (np.indices(d.shape).sum(0) == 0) * 255,
    "is white everywhere": lambda d: d * 0 + 255,
    "white along the whole border: it looks inverted": lambda d: (1 - d) * 255,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mask_that_is_hardly_meant_so_is_named(
    fault: str, drawn: np.ndarray, tmp_path: Path
) -> None:
    grey(FAULTS[fault](drawn)).save(tmp_path / "mask.png")
    assert fault in (decode_upright(source(tmp_path / "mask.png")).mask_fault or "")
    assert decode_upright(source(tmp_path / "mask.png", "white")).mask_fault is None


def test_polarity_turns_brightness_and_leaves_transparency(
    drawn: np.ndarray, tmp_path: Path
) -> None:
    for name, image in (("grey.png", grey((1 - drawn) * 255)), ("alpha.png", cut_out(drawn, 0))):
        image.save(tmp_path / name)
        mask = decode_mask(source(tmp_path / name, "black"))
        assert mask is not None
        np.testing.assert_array_equal(np.asarray(mask.grey), drawn * 255)


def test_opaque_alpha_is_no_mask_and_a_mask_outside_the_square_is_named(tmp_path: Path) -> None:
    def encoded(image: Image.Image) -> dict[str, Any]:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"label": "photo", "data": buffer.getvalue()}

    opaque = ImageSource(**encoded(Image.new("RGBA", (SIDE, SIDE), (9, 200, 9, 255))))
    assert load_image(opaque, resolution=SIDE, alpha="mask").mask is None
    wide = np.zeros((SIDE, 2 * SIDE), np.uint8)
    wide[8:24, :8] = 255  # the centre square begins at column 16
    grey(wide).save(tmp_path / "mask.png")
    image = Image.new("RGB", (2 * SIDE, SIDE), (9, 200, 9))
    loaded = load_image(ImageSource(**encoded(image), mask=tmp_path / "mask.png"), resolution=SIDE)
    assert loaded.mask_fault == "is empty within the centre square that is trained"
