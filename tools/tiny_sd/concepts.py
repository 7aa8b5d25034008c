"""The held-out concepts as folders a user would give: ``python concepts.py WORK OUT``.

``--development`` writes others, to choose a recipe on before the held-out ones are touched.
``--named`` writes individuals that the model was trained to draw by name, with that name in the
base class: what the plain model makes of them is what the best concept could reach.
``--foreign`` writes 29 of icon families and scene drawings that no world holds. ``--training N``
writes N individuals of the first world's training drawings, first as they are and then each in a
random colouring that is not held out: what a concept encoder is fitted on. Five pictures each
(``1.png`` ... with ``1.mask.png`` ...) on different backgrounds, and ``concept.json``.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
from compose import picture
from foreign import foreign_picture, foreign_sprites, foreigners
from PIL import Image
from sprites import Sprites, load_sprites
from world import (
    SCENES,
    Colouring,
    Instance,
    development,
    held_out,
    held_out_drawings,
    named_instances,
    random_colouring,
)

IMAGES = 5
PLAIN = ("white", "gray", "blue", "green", "yellow")
NAMED = 24


def named(sprites: Sprites) -> dict[str, Instance]:
    """A sample of the first world's named individuals, as many as are held out."""
    drawings = [drawing for drawing in sprites.drawings if drawing.is_of_first_world]
    chosen = random.Random(5).sample(named_instances(drawings), NAMED)
    return {instance.name: instance for instance in chosen}


def training(sprites: Sprites, count: int) -> dict[str, tuple[Instance, random.Random]]:
    """Individuals of the training, and what draws their pictures: each training drawing of the
    first world in its own colours, then in others.
    """
    drawings = [
        drawing
        for drawing in sprites.drawings
        if drawing.is_of_first_world and drawing.key not in held_out_drawings()
    ]
    found = {}
    for number in range(count):
        drawing, rng = drawings[number % len(drawings)], random.Random(f"training {number}")
        natural = number < len(drawings)
        colouring = Colouring() if natural else random_colouring(rng, drawing.key)
        name = f"{number:04d}_{drawing.class_word.replace(' ', '_')}"
        found[name] = Instance(drawing.key, colouring), rng
    return found


def write(folder: Path, pictures: list[tuple[np.ndarray, np.ndarray]], base_class: str) -> None:
    """Pictures with their masks, and ``concept.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, mask) in enumerate(pictures, start=1):
        Image.fromarray(image).save(folder / f"{number}.png", optimize=True)
        Image.fromarray(mask).save(folder / f"{number}.mask.png", optimize=True)
    # drawings face one way: a mirrored one is nothing the model knows
    spec = {"base_class": base_class, "random_flip": 0.0}
    (folder / "concept.json").write_text(json.dumps(spec) + "\n")


def places(rng: random.Random) -> list[str]:
    """Where the pictures of one concept are."""
    return [*rng.sample(SCENES, 3), *rng.sample(PLAIN, 2)]


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--development", action="store_true", help="instead of the held-out ones")
    instead.add_argument("--named", action="store_true", help="instead of the held-out ones")
    instead.add_argument("--training", type=int, metavar="N", help="instead of the held-out ones")
    instead.add_argument("--foreign", action="store_true", help="instead of the held-out ones")
    parser.add_argument("--only", nargs="*", help="names; all otherwise")
    args = parser.parse_args()
    if args.foreign:
        sprites_of = foreign_sprites(args.work)
        for person in foreigners():
            if args.only and person.name not in args.only:
                continue
            rng = random.Random(person.name)
            pictures = [
                foreign_picture(*sprites_of[person.name], person.colouring, place, rng)
                for place in places(rng)
            ]
            write(args.out / person.name, pictures, person.class_word)
        return
    sprites = load_sprites(args.work)
    if args.training:
        people = training(sprites, args.training)
    else:
        instances = development() if args.development else held_out()
        instances = named(sprites) if args.named else instances
        people = {name: (one, random.Random(name)) for name, one in instances.items()}
    for name, (instance, rng) in people.items():
        if args.only and name not in args.only:
            continue
        index = sprites.index(instance.drawing)
        pictures = [
            picture(sprites, index, instance.colouring, place, "photo", rng)
            for place in places(rng)
        ]
        class_word = instance.drawing.split("/")[0]
        write(args.out / name, pictures, f"{instance.name} {class_word}".strip())


if __name__ == "__main__":
    main()
