"""Any number of concepts: the package's examples with shifted hues."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import catversion_jax

EXAMPLES = Path(catversion_jax.__file__).parent / "assets" / "tiny-sd-examples"
GOLDEN = (5**0.5 - 1) / 2


def make_concepts(folder: Path, count: int) -> None:
    """Write so many, a folder each; the first ones are the examples as they are."""
    sources = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
    for number in range(count):
        source = sources[number % len(sources)]
        target = folder / f"{number:04d}_{source.name}"
        if (target / "concept.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        shift = int(256 * (GOLDEN * (number // len(sources)) % 1))
        for path in source.glob("[0-9].png"):
            hsv = np.asarray(Image.open(path).convert("HSV")).copy()
            hsv[..., 0] += np.uint8(shift)
            Image.fromarray(hsv, "HSV").convert("RGB").save(target / path.name)
        for path in (*source.glob("*.mask.png"), source / "concept.json"):
            shutil.copy(path, target)
