"""What another judge says of arms that ``run.py`` finished.

``python tools/study/judged.py OUT RESULT... --concepts FOLDER,FOLDER --arms ARM,ARM`` gathers the
pictures of each arm from every RESULT that has it into ``OUT/<arm>``, scores them with the judge
that ships (``catversion evaluate --dino tiny-sd-judge --gallery``) and prints a Markdown table for
each folder of concepts: the judge's cosine between drawn objects and the photos' objects, rank-1
and mean average precision among the photos of all concepts of the class, from both folders, and
the first arm's differences to the others.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from comparison import Figures, means, paired
from over_seeds import cell
from PIL import Image

from catversion_jax.assets import EMBEDDED_JUDGE, EMBEDDED_MODEL, embedded_folder
from catversion_jax.evaluation.evaluate import evaluate
from catversion_jax.evaluation.image_folders import PLAIN_FOLDER, mask_path, read_pixels

COLUMNS = {"dino_masked": "judge", "rank1": "rank-1", "mean_average_precision": "mAP"}


def gather(results: Sequence[Path], arm: str, out: Path) -> None:
    """Copy an arm's pictures and masks; those of the n-th result get seeds from 1000 n on."""
    for number, result in enumerate(results):
        folders = sorted((result / "arms" / arm / "images").glob("*/"))
        for folder in (one for one in folders if one.name != PLAIN_FOLDER):
            (out / folder.name).mkdir(parents=True, exist_ok=True)
            for mask in sorted(folder.glob("*.mask.png")):
                prompt, seed = mask.name.removesuffix(".mask.png").rsplit("_", 1)
                picture = out / folder.name / f"{prompt}_{1000 * number + int(seed)}.png"
                # without the settings in it, whose seed counts before the name's
                Image.fromarray(read_pixels(folder / f"{prompt}_{seed}.png")).save(picture)
                shutil.copyfile(mask, mask_path(picture))


def figures_of(folder: Path, concepts: Path) -> dict[str, Figures]:
    """The figures of ``COLUMNS`` of every concept, by name."""
    clip = embedded_folder(EMBEDDED_MODEL)
    assert clip is not None
    evaluation = evaluate(
        folder,
        concepts=str(concepts),
        prompts="tiny",
        clip=clip / "clip",
        dino=EMBEDDED_JUDGE,
        gallery=True,
    )
    (subjects,) = evaluation.methods.values()
    return {one.name: {name: getattr(one.total, name) for name in COLUMNS} for one in subjects}


def table(title: str, names: set[str], found: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    """Markdown of one folder's concepts: means, then the first arm minus each of the others."""
    arms = {
        arm: {name: value for name, value in concepts.items() if name in names}
        for arm, concepts in found.items()
    }
    first, *others = arms
    rows = {arm: means(concepts, tuple(COLUMNS)) for arm, concepts in arms.items()}
    differences = {
        f"{first} minus {arm}": paired(arms[first], arms[arm], tuple(COLUMNS)) for arm in others
    }
    lines = [f"| {title} | {' | '.join(COLUMNS.values())} |", "| --- |" + " ---: |" * len(COLUMNS)]
    for row, values in (rows | differences).items():
        cells = [cell(values.get(metric), sign=row in differences) for metric in COLUMNS]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return [*lines, ""]


def main(argv: Sequence[str]) -> int:
    """Gather, judge, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT")
    parser.add_argument("--concepts", required=True, help="folders of concepts, with commas")
    parser.add_argument("--arms", required=True, help="with commas; the first is compared")
    args = parser.parse_args(argv)
    sets = [Path(folder) for folder in args.concepts.split(",")]
    for folder in sets:
        shutil.copytree(folder, args.out / "concepts", dirs_exist_ok=True)
    found = {}
    for arm in args.arms.split(","):
        gather(args.results, arm, args.out / arm)
        found[arm] = figures_of(args.out / arm, args.out / "concepts")
    for folder in sets:
        names = {concept.name for concept in folder.glob("*/")}
        print("\n".join(table(folder.name, names, found)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
