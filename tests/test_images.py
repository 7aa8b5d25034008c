"""Decoding against closed forms: what each kind of file must look like, computed by hand with
numpy.
"""

import contextlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from catversion_jax.concepts import ImageSource
from catversion_jax.concepts.images import Crop, LoadedImage, load_image
from catversion_jax.errors import ConceptError

ORIENTATION = 0x0112


def source(
    image: Image.Image, kind: str = "PNG", *, mask: Path | None = None, **save: Any
) -> ImageSource:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return ImageSource("picture", data=buffer.getvalue(), mask=mask)


def bytes_of(loaded: LoadedImage) -> np.ndarray:
    """Pixels as the 0..255 values they came from."""
    return np.rint((loaded.pixels + 1.0) * 127.5).astype(int)


def constant(loaded: LoadedImage) -> list[int]:
    """The one colour of an image that has only one."""
    values = bytes_of(loaded).reshape(-1, 3)
    assert (values == values[0]).all()
    return values[0].tolist()


def random_rgb(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), np.uint8)


def test_pixels_are_float32_in_minus_one_to_one() -> None:
    values = random_rgb(np.random.default_rng(0), 8, 8)
    loaded = load_image(source(Image.fromarray(values)), resolution=8)
    assert loaded.pixels.dtype == np.float32
    assert loaded.mask is None
    np.testing.assert_array_equal(loaded.pixels, values.astype(np.float32) / 127.5 - 1.0)


# How an upright scene is stored in each orientation (EXIF tag 0x0112: on which side of the scene
# the stored row 0 and column 0 lie).
STORED = {
    1: lambda a: a,  # top, left
    2: lambda a: a[:, ::-1],  # top, right
    3: lambda a: a[::-1, ::-1],  # bottom, right
    4: lambda a: a[::-1],  # bottom, left
    5: lambda a: a.swapaxes(0, 1),  # left, top
    6: lambda a: a[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda a: a[::-1].swapaxes(0, 1),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation(orientation: int, kind: str, tmp_path: Path) -> None:
    """An image taken in any orientation is the same upright picture, and its upright mask fits
    it.
    """
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:16, :24] = (255, 0, 0)
    upright[:16, 24:] = (0, 255, 0)
    upright[16:, :24] = (0, 0, 255)
    Image.fromarray(upright[..., 0]).save(tmp_path / "mask.png")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options: dict[str, Any] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    photo = source(stored, kind, exif=exif, mask=tmp_path / "mask.png", **options)
    loaded = load_image(photo, resolution=32)
    tolerance = 2 if kind == "JPEG" else 0
    # The centre crop of the upright picture is its columns 8..40.
    expected = upright[:, 8:40].astype(int)
    flat = np.ones((32, 32), bool)
    flat[12:20], flat[:, 12:20] = False, False  # JPEG rings at the edges
    assert np.abs(bytes_of(loaded) - expected)[flat].max() <= tolerance
    assert loaded.mask is not None
    np.testing.assert_array_equal(loaded.mask, (upright[:, 8:40, 0] > 0).astype(np.float32))


def test_broken_exif_is_ignored() -> None:
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    photo = source(image, "JPEG", quality=100, exif=b"Exif\0\0garbage that is no TIFF header")
    assert np.abs(np.array(constant(load_image(photo, resolution=8))) - (10, 20, 30)).max() <= 1


def with_transparent_colour(mode: str, colour: Any, transparency: Any) -> ImageSource:
    return source(Image.new(mode, (8, 8), colour), transparency=transparency)


def test_transparency_is_composited_on_white() -> None:
    # c * a + 255 * (1 - a), in every way a file can say it
    assert constant(
        load_image(source(Image.new("RGBA", (8, 8), (200, 100, 0, 51))), resolution=8)
    ) == [
        244,
        224,
        204,
    ]
    assert constant(load_image(source(Image.new("RGBA", (8, 8), (9, 9, 9, 0))), resolution=8)) == [
        255,
        255,
        255,
    ]
    assert constant(load_image(source(Image.new("LA", (8, 8), (100, 51))), resolution=8)) == [
        224,
        224,
        224,
    ]
    assert (
        constant(load_image(with_transparent_colour("RGB", (1, 2, 3), (1, 2, 3)), resolution=8))
        == [255] * 3
    )
    assert constant(load_image(with_transparent_colour("L", 7, 7), resolution=8)) == [255] * 3
    assert constant(
        load_image(with_transparent_colour("RGB", (1, 2, 3), (9, 9, 9)), resolution=8)
    ) == [1, 2, 3]


def test_alpha_as_mask() -> None:
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :4] = 255
    alpha[:, 4:] = 51
    image = Image.new("RGB", (8, 8), (0, 0, 0))
    image.putalpha(Image.fromarray(alpha))
    assert load_image(source(image), resolution=8).mask is None
    loaded = load_image(source(image), resolution=8, alpha="mask")
    assert loaded.mask is not None
    np.testing.assert_allclose(loaded.mask, np.where(alpha == 255, 1.0, 0.2), atol=1e-6)
    assert bytes_of(loaded)[0, 0].tolist() == [0, 0, 0]
    assert bytes_of(loaded)[0, 7].tolist() == [204, 204, 204]
    assert load_image(source(Image.new("RGB", (8, 8))), resolution=8, alpha="mask").mask is None


def test_hidden_colour_does_not_bleed_into_the_edge() -> None:
    """Opaque white beside transparent black stays white however it is resized."""
    values = np.zeros((64, 64, 4), np.uint8)
    values[:, :31] = 255
    assert constant(load_image(source(Image.fromarray(values)), resolution=16)) == [255, 255, 255]


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    assert constant(load_image(source(image), resolution=8)) == [10, 20, 30]
    assert constant(load_image(source(image, transparency=1), resolution=8)) == [255, 255, 255]
    # one alpha per palette entry: 10 * 102/255 + 255 * 153/255 = 157
    assert constant(
        load_image(source(image, transparency=bytes([255, 102, 255])), resolution=8)
    ) == [
        157,
        161,
        165,
    ]


def test_greyscale_and_one_bit() -> None:
    assert constant(load_image(source(Image.new("L", (8, 8), 77)), resolution=8)) == [77, 77, 77]
    assert constant(load_image(source(Image.new("1", (8, 8), 1)), resolution=8)) == [255, 255, 255]


def test_cmyk() -> None:
    # (255 - ink) * (255 - black) / 255
    loaded = load_image(source(Image.new("CMYK", (8, 8), (255, 51, 0, 102)), "TIFF"), resolution=8)
    assert constant(loaded) == [0, 122, 153]
    jpeg = load_image(
        source(Image.new("CMYK", (8, 8), (255, 51, 0, 102)), "JPEG", quality=100), resolution=8
    )
    assert np.abs(np.array(constant(jpeg)) - [0, 122, 153]).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(kind: str) -> None:
    values = np.full((8, 8), 32896, np.uint16)  # 128 * 257
    assert constant(load_image(source(Image.fromarray(values), kind), resolution=8)) == [128] * 3
    top = np.full((8, 8), 65535, np.uint16)
    assert constant(load_image(source(Image.fromarray(top), kind), resolution=8)) == [255] * 3


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand (PNG specification, 5.2): signature, IHDR, IDAT, IEND."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_sixteen_bit_colour() -> None:
    row = b"\0" + struct.pack(">HHH", 257 * 10, 257 * 20, 257 * 200) * 8
    loaded = load_image(
        ImageSource("x", data=png(8, 8, 16, 2, zlib.compress(row * 8))), resolution=8
    )
    assert constant(loaded) == [10, 20, 200]


def test_float_tiff() -> None:
    unit = load_image(
        source(Image.fromarray(np.full((8, 8), 0.2, np.float32)), "TIFF"), resolution=8
    )
    assert constant(unit) == [51, 51, 51]


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind in ("GIF", "PNG", "WEBP"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        animated = source(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert constant(load_image(animated, resolution=8)) == [255, 0, 0]


@pytest.mark.parametrize(("height", "width"), [(32, 64), (64, 32), (32, 32), (128, 64)])
def test_center_crop_is_resize_then_crop(height: int, width: int) -> None:
    """Equal to resizing the whole image with PIL and cutting the middle, where that middle is whole
    pixels.
    """
    image = Image.fromarray(random_rgb(np.random.default_rng(1), height, width))
    side = 16
    scale = side / min(height, width)
    whole = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - side) // 2, (whole.height - side) // 2
    expected = np.asarray(whole)[top : top + side, left : left + side]
    # PIL rounds to 8 bits between its horizontal and vertical pass, and the two ways take them in
    # other orders.
    difference = np.abs(bytes_of(load_image(source(image), resolution=side)) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.5


def test_squash_is_the_official_resize() -> None:
    image = Image.fromarray(random_rgb(np.random.default_rng(2), 40, 64))
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        bytes_of(load_image(source(image), resolution=16, crop="squash")), expected
    )


@pytest.mark.parametrize("crop", ["center", "squash"])
def test_mask_follows_the_image(crop: Crop, tmp_path: Path) -> None:
    """A mask that is the image's own brightness stays so in every geometry, also when saved at half
    size.
    """
    inside = np.zeros((64, 128), np.uint8)
    inside[16:48, 40:104] = 255
    image = Image.fromarray(np.repeat(inside[..., None], 3, axis=2))
    for factor in (1, 2):
        Image.fromarray(inside[::factor, ::factor]).save(tmp_path / "mask.png")
        loaded = load_image(source(image, mask=tmp_path / "mask.png"), resolution=32, crop=crop)
        assert loaded.mask is not None
        assert loaded.mask.dtype == np.float32
        columns = slice(32, 96) if crop == "center" else slice(None)
        blocks = inside[:, columns].reshape(32, 2, 32, -1).mean(axis=(1, 3)) / 255.0
        np.testing.assert_allclose(loaded.mask, blocks, atol=1e-6)
        assert ((loaded.pixels[..., 0] > 0) == (loaded.mask > 0.5)).all()


def test_mask_of_another_shape_is_refused(tmp_path: Path) -> None:
    Image.new("L", (16, 32)).save(tmp_path / "mask.png")
    with pytest.raises(
        ConceptError, match=r"mask\.png: the mask is 16 x 32, its image picture is 32 x 16"
    ):
        load_image(source(Image.new("RGB", (32, 16)), mask=tmp_path / "mask.png"), resolution=8)


def test_truncated_jpeg(tmp_path: Path) -> None:
    image = Image.fromarray(random_rgb(np.random.default_rng(3), 64, 64))
    data = source(image, "JPEG").data
    assert data is not None
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        ConceptError, match=r"cut\.jpg: cannot be decoded.*truncated.*Replace or remove"
    ):
        load_image(ImageSource("cut.jpg", tmp_path / "cut.jpg"), resolution=8)


def test_damaged_files_of_every_kind() -> None:
    """Cut anywhere or with flipped bytes: a picture or a ConceptError, never another exception."""
    rng = np.random.default_rng(4)
    image = Image.fromarray(random_rgb(rng, 24, 24))
    for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "TGA", "JPEG2000"):
        data = source(image, kind).data
        assert data is not None
        for _ in range(12):
            damaged = bytearray(data[: rng.integers(1, len(data) + 1)])
            for _ in range(4):
                damaged[rng.integers(len(damaged))] = rng.integers(256)
            with contextlib.suppress(ConceptError):
                assert load_image(
                    ImageSource("damaged", data=bytes(damaged)), resolution=8
                ).pixels.shape == (
                    8,
                    8,
                    3,
                )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jpg", b"hello", "is not an image"),
        ("a.png", b"", "is not an image.*or is empty"),
        ("a.heic", b"\0\0\0\x18ftypheic", "Convert it to JPEG"),
        ("a.jpg", None, "No such file"),
    ],
)
def test_files_that_are_no_images(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConceptError, match=message):
        load_image(ImageSource(name, tmp_path / name), resolution=8)


def test_decompression_bomb_is_refused_from_its_header() -> None:
    bomb = png(20_000, 20_000, 1, 0, zlib.compress(bytes(2501 * 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(
        ConceptError,
        match=r"picture: too large.*400000000 pixels.*limit of \d+ pixels.*Scale it down",
    ):
        load_image(ImageSource("picture", data=bomb), resolution=8)


def test_a_large_photo_is_not_a_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    photo = source(Image.new("RGB", (40, 40), (5, 6, 7)))  # above PIL's warning, below its refusal
    assert constant(load_image(photo, resolution=8)) == [5, 6, 7]


def test_heic(tmp_path: Path) -> None:
    """As iPhones store photos, once the plugin is there."""
    plugin = pytest.importorskip("pillow_heif", reason="pip install 'catversion-jax[heic]'")
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:, 48:] = (200, 40, 30)
    plugin.from_pillow(Image.fromarray(upright)).save(tmp_path / "a.HEIC", quality=100)
    photo = ImageSource("a.HEIC", tmp_path / "a.HEIC")
    pixels = bytes_of(load_image(photo, resolution=64))
    assert np.abs(pixels[:, 40:] - (200, 40, 30)).max() <= 6
    assert pixels[:, :24].max() <= 6
