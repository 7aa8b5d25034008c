"""The held-out concepts as folders a user would give: ``python concepts.py WORK OUT``.

``--development`` writes others, to choose a recipe on before the held-out ones are touched. Five
pictures each (``1.png`` ... with ``1.mask.png`` ...) on different backgrounds, and
``concept.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from compose import picture
from PIL import Image
from sprites import load_sprites
from world import SCENES, development, held_out

IMAGES = 5
PLAIN = ("white", "gray", "blue", "green", "yellow")


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--development", action="store_true", help="instead of the held-out ones")
    parser.add_argument("--only", nargs="*", help="names; all otherwise")
    args = parser.parse_args()
    sprites = load_sprites(args.work)
    for name, instance in (development() if args.development else held_out()).items():
        if args.only and name not in args.only:
            continue
        folder, rng = args.out / name, random.Random(name)
        folder.mkdir(parents=True, exist_ok=True)
        places = [*rng.sample(SCENES, 3), *rng.sample(PLAIN, 2)]
        for number, place in enumerate(places, start=1):
            image, mask = picture(
                sprites, sprites.index(instance.drawing), instance.colouring, place, "photo", rng
            )
            Image.fromarray(image).save(folder / f"{number}.png", optimize=True)
            Image.fromarray(mask).save(folder / f"{number}.mask.png", optimize=True)
        # drawings face one way: a mirrored one is nothing the model knows
        spec = {"base_class": instance.drawing.split("/")[0], "random_flip": 0.0}
        (folder / "concept.json").write_text(json.dumps(spec) + "\n")


if __name__ == "__main__":
    main()
