"""The held-out concepts as folders a user would give: ``python concepts.py WORK OUT``.

``--development`` writes others, to choose a recipe on before the held-out ones are touched.
``--named`` writes individuals that the model was trained to draw by name, with that name in the
base class: what the plain model makes of them is what the best concept could reach. Five pictures
each (``1.png`` ... with ``1.mask.png`` ...) on different backgrounds, and ``concept.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from compose import picture
from PIL import Image
from sprites import Sprites, load_sprites
from world import SCENES, Instance, development, held_out, named_instances

IMAGES = 5
PLAIN = ("white", "gray", "blue", "green", "yellow")
NAMED = 24


def named(sprites: Sprites) -> dict[str, Instance]:
    """A sample of the named individuals of the training, as many as are held out."""
    chosen = random.Random(5).sample(named_instances(sprites.drawings), NAMED)
    return {instance.name: instance for instance in chosen}


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--development", action="store_true", help="instead of the held-out ones")
    instead.add_argument("--named", action="store_true", help="instead of the held-out ones")
    parser.add_argument("--only", nargs="*", help="names; all otherwise")
    args = parser.parse_args()
    sprites = load_sprites(args.work)
    if args.named:
        instances = named(sprites)
    else:
        instances = development() if args.development else held_out()
    for name, instance in instances.items():
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
        class_word = instance.drawing.split("/")[0]
        base_class = f"{instance.name} {class_word}".strip()
        spec = {"base_class": base_class, "random_flip": 0.0}
        (folder / "concept.json").write_text(json.dumps(spec) + "\n")


if __name__ == "__main__":
    main()
