"""Colours of stranger files: profiles against Pillow's own engine, wide numbers in closed form."""

import dataclasses
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin

from catversion_jax.concepts import ImageSource
from catversion_jax.concepts.images import decode_mask, decode_photo
from catversion_jax.errors import ConceptError


def encoded(image: Image.Image, kind: str = "PNG", **save: Any) -> ImageSource:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return ImageSource("photo", data=buffer.getvalue())


def s15(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def display_p3() -> bytes:
    """A matrix profile written by hand (ICC.1:2001-04): Display P3's primaries adapted to D50.

    Its curve is gamma 2.2 instead of sRGB's, which moves greys by a level or two.
    """

    def text(tag: bytes, content: bytes) -> bytes:
        return tag + bytes(4) + content

    name = b"Display P3 by hand\0"
    description = text(b"desc", struct.pack(">I", len(name)) + name + bytes(78))
    primaries = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
        b"wtpt": (0.96420, 1.0, 0.82491),
    }
    curve = text(b"curv", struct.pack(">IH", 1, round(2.2 * 256)))
    tags = {b"desc": description, b"cprt": text(b"text", b"none\0")}
    tags |= {tag: text(b"XYZ ", b"".join(map(s15, xyz))) for tag, xyz in primaries.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    start, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    content = struct.pack(">I", len(tags)) + table + body
    header = struct.pack(">I4sI4s4s4s", 128 + len(content), b"lcms", 0x02400000, b"mntr", b"RGB ",
                         b"XYZ ")  # fmt: skip
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp")
    header = header.ljust(68, b"\0") + s15(0.9642) + s15(1.0) + s15(0.82491)
    return header.ljust(128, b"\0") + content


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_profile_is_converted_to_srgb(kind: str, mode: str) -> None:
    stored = Image.new("RGB", (8, 8), (202, 59, 44))
    profile = ImageCms.ImageCmsProfile(io.BytesIO(display_p3()))
    expected = ImageCms.profileToProfile(
        stored, profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert expected is not None
    assert abs(expected.getpixel((0, 0))[0] - 202) >= 17  # else nothing is shown
    image = stored.quantize() if mode == "P" else stored.convert(mode)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    photo = decode_photo(
        encoded(
            image,
            kind,
            icc_profile=display_p3(),
            **lossless,
        )
    )
    np.testing.assert_array_equal(np.asarray(photo.picture), np.asarray(expected))
    assert photo.notes == ("colours converted to sRGB from Display P3 by hand",)
    assert photo.warnings == ()


def test_srgb_stays_to_the_bit_and_without_a_note() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = decode_photo(encoded(Image.fromarray(pixels), icc_profile=srgb))
    np.testing.assert_array_equal(np.asarray(photo.picture), pixels)
    assert photo.notes == photo.warnings == ()


@pytest.mark.parametrize(
    "profile",
    [b"no profile at all", display_p3()[:200], display_p3().replace(b"RGB ", b"CMYK")],
)
def test_a_broken_profile_is_named_and_the_pixels_stay(profile: bytes) -> None:
    photo = decode_photo(encoded(Image.new("RGB", (8, 8), (202, 59, 44)), icc_profile=profile))
    assert photo.picture.getpixel((0, 0)) == (202, 59, 44)
    (warning,) = photo.warnings
    assert warning.startswith("colours taken as sRGB: its colour profile is broken")


def test_other_colours_than_srgb_without_a_profile_are_named() -> None:
    exif = Image.Exif()
    exif[ExifTags.IFD.Exif] = {ExifTags.IFD.Interop.value: {ExifTags.Interop.InteropIndex: "R03"}}
    red = Image.new("RGB", (8, 8), (202, 59, 44))
    (warning,) = decode_photo(encoded(red, "JPEG", exif=exif)).warnings
    assert "Adobe RGB" in warning

    def png(**chunks: bytes) -> tuple[str, ...]:
        info = PngImagePlugin.PngInfo()
        for name, content in chunks.items():
            info.add(name.encode(), content)
        return decode_photo(encoded(red, pnginfo=info)).warnings

    p3 = struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    srgb = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    assert "cHRM" in png(cHRM=p3)[0]
    assert "gAMA chunk says 1" in png(gAMA=struct.pack(">I", 100_000))[0]
    assert png(cHRM=srgb, gAMA=struct.pack(">I", 45_455)) == ()
    assert png(sRGB=b"\0", gAMA=struct.pack(">I", 100_000)) == ()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_fewer_bits_in_sixteen_fill_the_range(bits: int, kind: str) -> None:
    top = 2**bits - 1
    values = np.linspace(0, top, 64).round().astype(np.uint16).reshape(8, 8)
    photo = decode_photo(encoded(Image.fromarray(values), kind))
    expected = np.rint(values / top * 255)
    np.testing.assert_array_equal(np.asarray(photo.picture)[..., 0], expected)
    assert any(f"{bits}-bit numbers" in text for text in photo.warnings) == (bits < 16)


def test_what_cannot_be_told_from_darkness_is_named() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    # 12-bit numbers in a 16-bit colour PNG, of which Pillow keeps the upper bytes
    row = b"\0" + struct.pack(">HHH", 4095, 2000, 100) * 8
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
    png = header + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")
    photo = decode_photo(ImageSource("photo", data=b"\x89PNG\r\n\x1a\n" + png))
    assert photo.warnings == ("nearly black; if it should not be, save it with 8 bits per channel",)
    fourteen = Image.fromarray(np.full((8, 8), 16000, np.uint16))
    (warning,) = decode_photo(encoded(fourteen)).warnings
    assert warning.startswith("dark, uses 16000 of 65535 levels")


@pytest.mark.parametrize(
    ("values", "white"), [((0.0, 0.5, 1.0), 1), ((0, 0.5, 1.2), 1), ((0, 100, 255), 255)]
)
def test_floats_are_scaled_by_their_range(values: tuple[float, ...], white: float) -> None:
    photo = decode_photo(encoded(Image.fromarray(np.array([values], np.float32)), "TIFF"))
    expected = np.clip(np.rint(np.array(values) / white * 255), 0, 255)
    np.testing.assert_array_equal(np.asarray(photo.picture)[0, :, 0], expected)
    assert bool(photo.warnings) == (white != 1)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([-5, 70_000], np.int32), "go down to -5: signed"),
        (np.array([0, np.nan], np.float32), "1 of its 2 numbers are NaN or infinite"),
        (np.array([np.inf, 1], np.float32), "1 of its 2 numbers are NaN or infinite"),
        (np.array([-1, 1], np.float32), "go down to -1; black must be 0"),
        (np.array([-128, 127], np.float32), "go down to -128; black must be 0"),
    ],
)
def test_numbers_that_are_no_brightness_are_refused(
    values: np.ndarray, said: str, tmp_path: Path
) -> None:
    picture = encoded(Image.fromarray(values[None]), "TIFF")
    with pytest.raises(ConceptError, match=f"colours cannot be read .*{said}.*Save it as"):
        decode_photo(picture)
    mask = tmp_path / "1.mask.tiff"
    mask.write_bytes(picture.data or b"")
    with pytest.raises(ConceptError, match=f"is no mask .*{said}"):
        decode_mask(dataclasses.replace(picture, mask=mask))


@pytest.mark.parametrize(("top", "white"), [(2**31 - 1, 2**31 - 1), (70_000, 2**24 - 1)])
def test_thirty_two_bits_have_a_sign(top: int, white: int) -> None:
    values = np.array([[0, top // 2, top]], np.int32)
    photo = decode_photo(encoded(Image.fromarray(values), "TIFF"))
    expected = np.rint(values / white * 255)
    np.testing.assert_array_equal(np.asarray(photo.picture)[..., 0], expected)
    assert any(f"taken as {white} for white" in text for text in photo.warnings)


def test_a_little_below_black_is_black() -> None:
    values = np.array([[-0.05, 0.5, 1.0]], np.float32)
    photo = decode_photo(encoded(Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(np.asarray(photo.picture)[0, :, 0], [0, 128, 255])


def test_the_first_frame_of_several_is_said() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for kind, word in (("GIF", "frame"), ("PNG", "frame"), ("WEBP", "frame"), ("TIFF", "page")):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        several = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        photo = decode_photo(several)
        assert photo.picture.getpixel((0, 0)) == (255, 0, 0)
        (note,) = photo.notes
        assert word in note
        assert decode_photo(encoded(frames[0], kind, **options)).notes == ()
