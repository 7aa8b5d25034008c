"""Stage 1: download the icon packages and render them: ``python tools/tiny_sd/sprites.py WORK``.

Reads 24 MB from the npm registry (each package holds one JSON file of SVG bodies), renders every
drawing of ``world.ICONS`` and ``forms.FORMS`` with resvg at 96 px, and finds the two areas that
recolouring may paint. Writes ``WORK/sprites.npz``: ``rgba [N 96 96 4]``, ``area [N 96 96]`` (1 main
colour, 2 second colour, 0 neither), and their descriptions in ``WORK/sprites.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from forms import FORMS, WIDE_FAMILIES
from PIL import Image
from scipy.cluster.vq import kmeans2
from world import COLOUR_NAMES, COLOURS, FAMILIES, FAMILY_WORDS, ICONS, Drawing

logger = logging.getLogger(__name__)
SIDE = 96
VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "fluent-emoji-flat": "1.2.6",
    "twemoji": "1.2.5",
    "emojione": "1.2.3",
    "fxemoji": "1.2.2",
    "streamline-emojis": "1.2.4",
    "fluent-emoji": "1.2.7",
    # of foreign.json
    "flat-color-icons": "1.2.3",
    "game-icons": "1.2.4",
    "icon-park": "1.2.4",
    "streamline-flex-color": "1.2.2",
    "streamline-freehand-color": "1.2.2",
    "streamline-plump-color": "1.2.2",
    "streamline-stickies-color": "1.2.2",
    "streamline-ultimate-color": "1.2.2",
}


@dataclasses.dataclass(frozen=True)
class Sprites:
    """All drawings: ``rgba [N 96 96 4]`` uint8, ``area [N 96 96]`` uint8."""

    drawings: list[Drawing]
    rgba: np.ndarray
    area: np.ndarray

    def index(self, key: str) -> int:
        """Row of a drawing."""
        return [drawing.key for drawing in self.drawings].index(key)


def load_sprites(work: Path) -> Sprites:
    """What this stage wrote."""
    arrays = np.load(work / "sprites.npz")
    entries = json.loads((work / "sprites.json").read_text())
    return Sprites([read_drawing(e) for e in entries], arrays["rgba"], arrays["area"])


def read_drawing(entry: dict) -> Drawing:
    """One entry of ``sprites.json``."""
    colours = entry["colours"][0], entry["colours"][1]
    return Drawing(entry["class_word"], entry["family"], colours, entry["form"])


def read_package(family: str, work: Path) -> dict:
    """The icon set of one npm package, downloaded once."""
    folder = work / "npm"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"iconify-json-{family}-{VERSIONS[family]}.tgz"
    if not archive.exists():
        spec = f"@iconify-json/{family}@{VERSIONS[family]}"
        subprocess.run(["npm", "pack", "--silent", spec], cwd=folder, check=True)
    with tarfile.open(archive) as tar:
        member = tar.extractfile("package/icons.json")
        assert member is not None, archive
        icons = json.load(member)
    icons.setdefault("width", 16), icons.setdefault("height", 16)
    return icons


def find_svg(icons: dict, names: tuple[str, ...]) -> str | None:
    """A complete SVG of the first name the set has, or None."""
    for name in names:
        target = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if icon := icons["icons"].get(target):
            sizes = {**icons, **icon}
            box = (icon.get("left", 0), icon.get("top", 0), sizes["width"], sizes["height"])
            return (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
                f' viewBox="{" ".join(map(str, box))}" width="{SIDE}" height="{SIDE}">'
                f"{icon['body']}</svg>"
            )
    return None


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D65) of sRGB ``[... 3]`` uint8."""
    c = rgb / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], -1
    )


def nearest_colour(rgb: np.ndarray) -> str:
    """The colour word of one sRGB value."""
    table = lab(np.array(list(COLOURS.values())))
    return COLOUR_NAMES[int(np.argmin(((table - lab(rgb)) ** 2).sum(-1)))]


def paint_areas(rgba: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """The areas of the main and the second colour, and the words for those colours.

    Colours are clustered in L*a*b* with lightness at half weight, so that a shaded body stays one
    area. Near-black clusters (outlines, eyes) are left alone unless the drawing is mostly black.
    """
    opaque = rgba[..., 3] > 128
    values = lab(rgba[opaque][:, :3])
    features = values * np.array([0.5, 1.0, 1.0])
    count = min(6, len(np.unique(features, axis=0)))
    centres, labels = kmeans2(features, count, minit="++", seed=3, iter=30)
    groups: list[list[int]] = []
    for k in np.argsort(-np.bincount(labels, minlength=count)):
        near = [g for g in groups if np.linalg.norm(centres[g[0]] - centres[k]) < 24]
        near[0].append(int(k)) if near else groups.append([int(k)])
    share = [float(np.isin(labels, g).mean()) for g in groups]
    light = [float(values[np.isin(labels, g)][:, 0].mean()) for g in groups]
    usable = [i for i in np.argsort(share)[::-1] if light[i] > 28 or share[i] > 0.5]
    area = np.zeros(opaque.shape, np.uint8)
    words = ["", ""]
    for number, i in enumerate(usable[:2]):
        if number and share[i] < 0.06:
            break
        members = np.isin(labels, groups[i])
        painted = np.zeros_like(opaque)
        painted[opaque] = members
        area[painted] = number + 1
        words[number] = nearest_colour(np.median(rgba[painted][:, :3], axis=0))
    return area, (words[0], words[1])


def wanted() -> list[tuple[Drawing, tuple[str, ...]]]:
    """Drawings, not all of which exist, and the icon's names; the first world's come first."""
    first = [
        (Drawing(word, family), names)
        for family in FAMILIES
        for word, (names, excluded) in ICONS.items()
        if family not in excluded
    ]
    forms = [
        (Drawing(word, family, form=form), names)
        for family in FAMILY_WORDS
        for word, of_class in FORMS.items()
        for form, (names, excluded) in of_class.items()
        if family not in excluded
    ]
    added = [
        (Drawing(w, family), names) for family in WIDE_FAMILIES for w, (names, _) in ICONS.items()
    ]
    return first + forms + added


def draw_all(wanted: list[tuple[Drawing, tuple[str, ...]]], work: Path) -> Sprites:
    """Render those that their package has."""
    import resvg_py

    packages: dict[str, dict] = {}
    drawings, images, areas = [], [], []
    for drawing, names in wanted:
        if drawing.family not in packages:
            packages[drawing.family] = read_package(drawing.family, work)
        svg = find_svg(packages[drawing.family], names)
        if svg is None:
            continue
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg))
        rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA").resize((SIDE, SIDE)))
        area, colours = paint_areas(rgba)
        drawings.append(dataclasses.replace(drawing, colours=colours))
        images.append(rgba)
        areas.append(area)
    return Sprites(drawings, np.stack(images), np.stack(areas))


def main() -> None:
    """Render everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    sprites = draw_all(wanted(), work)
    np.savez_compressed(work / "sprites.npz", rgba=sprites.rgba, area=sprites.area)
    text = json.dumps([dataclasses.asdict(d) for d in sprites.drawings], indent=0)
    (work / "sprites.json").write_text(text)
    for kind in ("first", "wide"):
        chosen = [d for d in sprites.drawings if d.is_of_first_world or kind == "wide"]
        classes = len({d.class_word for d in chosen})
        logger.info("%s world: %d drawings of %d classes", kind, len(chosen), classes)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
