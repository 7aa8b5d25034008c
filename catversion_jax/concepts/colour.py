"""Stored numbers -> 8-bit sRGB, the colours that Stable Diffusion was trained on.

A picture with an ICC profile is converted (a phone's Display P3 red is 18 levels off otherwise).
Files of 16 bits and floats are scaled by the range of their numbers, because cameras and scanners
store 10 or 12 bits in them.
"""

from __future__ import annotations

import dataclasses
import io

import numpy as np
from PIL import ExifTags, Image, ImageCms

from catversion_jax.errors import shown

_SRGB = ImageCms.createProfile("sRGB")
_PROFILE_MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_SRGB_RED, _SRGB_GAMMA = (0.64, 0.33), 1 / 2.2
_SRGB_PRIMARIES = (1, 2)  # of ITU-T H.273: BT.709, and unspecified
# A whole picture below this level is black to the eye: numbers of fewer bits than the file has.
_NEARLY_BLACK = 16
# How far below black sharpening takes a picture of floats, as a share of white.
_UNDERSHOOT = 0.1


@dataclasses.dataclass(frozen=True)
class Flattened:
    """A picture without transparency.

    Attributes:
      picture: 8-bit sRGB on the background.
      transparency: its alpha channel; None where all of it is opaque.
      notes: what was done to the colours.
      warnings: what may be wrong with them.
    """

    picture: Image.Image
    transparency: Image.Image | None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def flattened(image: Image.Image, background: tuple[int, int, int]) -> Flattened:
    """A decoded picture as 8-bit sRGB.

    Compositing before any resizing keeps the hidden colours under transparent pixels from bleeding
    into the edge.
    """
    profile = image.info.get("icc_profile")
    other = None if profile else _other_space(image)
    image, warnings = eight_bits(image)
    if other is not None:
        warnings.append(f"colours taken as sRGB, but {other}; save it as sRGB")
    alpha = transparency(image)
    if image.mode in ("LA", "1"):
        image = image.convert("L")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGBA").convert("RGB")
    rgb = image.convert("RGB")
    notes: list[str] = []
    if profile:
        try:
            rgb, notes = _in_srgb(image, profile)
        # littlecms lets many classes of error through
        except Exception as error:
            warnings.append(f"colours taken as sRGB: its colour profile is broken ({shown(error)})")
    if alpha is not None:
        rgb = Image.composite(rgb, Image.new("RGB", rgb.size, background), alpha)
    counts = np.array(rgb.histogram()).reshape(3, 256)
    if not counts[:, _NEARLY_BLACK:].any():
        warnings.append("nearly black; if it should not be, save it with 8 bits per channel")
    return Flattened(rgb, alpha, tuple(notes), tuple(warnings))


def transparency(image: Image.Image) -> Image.Image | None:
    """The alpha channel of an 8-bit picture, in whichever way its file says it; None where all of
    it is opaque.
    """
    if not image.has_transparency_data:
        return None
    alpha = image.convert("RGBA").getchannel("A")
    return None if alpha.getextrema() == (255, 255) else alpha


def _other_space(image: Image.Image) -> str | None:
    """What else than a profile says that the colours are not sRGB: a camera's Adobe RGB, the chunks
    of a PNG, or the numbers of a HEIC file. None where nothing does.
    """
    try:
        exif = image.getexif()
        if exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03":
            return "its EXIF data says Adobe RGB"
        primaries = (image.info.get("nclx_profile") or {}).get("color_primaries")
        if primaries not in (None, *_SRGB_PRIMARIES):
            return f"it says primaries {primaries} (ITU-T H.273)"
        if "srgb" in image.info:
            return None
        x, y = image.info.get("chromaticity", (0, 0, *_SRGB_RED))[2:4]
        if abs(x - _SRGB_RED[0]) + abs(y - _SRGB_RED[1]) > 0.01:
            return "its cHRM chunk says other primaries"
        gamma = image.info.get("gamma", _SRGB_GAMMA)
        return f"its gAMA chunk says {gamma:g}" if abs(gamma - _SRGB_GAMMA) > 0.02 else None
    except Exception:
        return None  # EXIF data that cannot be parsed says nothing about colours


def _in_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, list[str]]:
    """``RGB`` by way of the profile, and a note where that moved colours.

    Raises:
      ValueError: the profile is for another kind of picture.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space
    if _PROFILE_MODES.get(space) != image.mode:
        raise ValueError(f"it is for {space.strip()}, the picture is {image.mode}")
    converted = ImageCms.profileToProfile(image, source, _SRGB, outputMode="RGB")
    if converted is None:
        raise ValueError("it converts nothing")
    name = ImageCms.getProfileDescription(source).strip()
    same = image.mode == "L" or "srgb" in name.casefold()
    return converted, [] if same else [f"colours converted to sRGB from {name:.60}"]


def eight_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """Greyscale of 16 or 32 bits or floats scaled to 8 bits, where Pillow's own conversion clips.

    Returns:
      The picture, and a line where its numbers do not fill the range of their type.

    Raises:
      ValueError: numbers that are no brightness: negative, infinite or NaN.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image, np.uint16)
        top, notes = _range(int(values.max(initial=0)))
        table = np.arange(2**16, dtype=np.float64) / top
        return Image.fromarray(_round_to_bytes(table)[values]), notes
    if image.mode == "I":
        values = np.asarray(image)
        if values.min(initial=0) < 0:
            raise ValueError(
                f"its 32-bit numbers go down to {values.min()}: signed ones, or beyond {2**31 - 1}"
            )
        top, notes = _range(int(values.max(initial=0)))
        return Image.fromarray(_round_to_bytes(values / top)), notes
    if image.mode == "F":
        values = np.asarray(image)
        if lacking := int(values.size - np.isfinite(values).sum()):
            raise ValueError(f"{lacking} of its {values.size} numbers are NaN or infinite")
        largest = float(values.max(initial=0.0))
        # floats count to 1, a highlight beyond it included, or to 255 or 65535
        white = next(
            (t for t in (1.0, 255.0, 65535.0) if largest <= max(t, _NEARLY_BLACK)), largest
        )
        if values.min(initial=0.0) < -_UNDERSHOOT * white:
            raise ValueError(f"its numbers go down to {values.min():g}; black must be 0")
        notes = [] if white == 1.0 else [f"floats up to {largest:g}, taken as {white:g} for white"]
        return Image.fromarray(_round_to_bytes(values / white)), notes
    return image, []


def _range(largest: int) -> tuple[int, list[str]]:
    """The number that means white, given the largest of a file of 16 or more bits."""
    if largest == 0:
        return 65535, []
    for bits in (8, 10, 12, 16, 24, 31):  # Pillow's numbers of 32 bits have a sign
        top = 2**bits - 1
        if largest <= top:
            break
    if bits == 16:
        dark = largest < 2**14
        remedy = "if it holds 14 bits, save it again with 8"
        return top, [f"dark, uses {largest} of 65535 levels; {remedy}"] if dark else []
    return top, [f"{bits}-bit numbers in a wider file, taken as {top} for white"]


def _round_to_bytes(unit: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(unit * 255.0), 0, 255).astype(np.uint8)
