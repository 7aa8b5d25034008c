"""Run the study: ``python tools/study/run.py OUT --model DIR --concepts DIR``.

Trains, draws and scores every arm of ``arms.py`` that is not done yet, one after the other, in one
process, on whatever jax finds. Then writes OUT/results.json, results.csv and analyses.json, from
which ``page.py`` makes the page. Stop it when you like: the same command goes on.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from analyses import attention_mass, class_shares, image_changes
from arms import Arm, make_arms
from comparison import compare, real_images
from study import Protocol, Study, evenly_spread, write_json

from catversion_jax import __version__
from catversion_jax.concepts import read_concepts
from catversion_jax.config.sampling import SAMPLERS, SamplingSettings
from catversion_jax.errors import CatVersionError
from catversion_jax.evaluation.prompts import load_prompt_set
from catversion_jax.models.embedders import ClipEmbedder, DinoEmbedder
from catversion_jax.models.stable_diffusion import load_model
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import embedded_or_given

logger = logging.getLogger("study")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("out", type=Path, help="receives everything")
    add("--model", required=True, help="diffusers folder")
    add("--concepts", required=True, help="folder of held-out concepts, with masks")
    add("--clip", help="transformers CLIPModel folder [the model's own clip/]")
    add("--dino", help="a second judge, as catversion evaluate takes it, such as tiny-sd-judge")
    add("--only", help="comma-separated arms, or questions such as methods,layers [all]")
    add("--prompts", default="tiny", help="prompt set [tiny]")
    add("--seeds", type=int, default=4, help="images per prompt of the methods [4]")
    add("--ablation_seeds", type=int, default=1, help="images per prompt of the ablations [1]")
    add("--training_seed", type=int, default=42, help="of the trainer and the baseline [42]")
    add("--max_concepts", type=int, help="only so many concepts, to try the study out")
    add("--ablation_concepts", type=int, help="concepts the ablations train [all]")
    add("--train_steps", type=int, help="instead of each arm's own, to try the study out")
    add("--num_prior_images", type=int, default=8, help="of other classes per concept [8]")
    add("--sampler", choices=SAMPLERS, default="ddim")
    add("--num_inference_steps", type=int, default=25)
    add("--guidance_scale", type=float, default=5.0)
    add("--batch_size", type=int, default=4, help="images denoised together [4]")
    add("--concepts_per_device", type=int, default=8, help="concepts trained at once [8]")
    add("--compilation_cache", default="~/.cache/catversion/xla", help="jax's, shared by all arms")
    return parser.parse_args(argv)


def chosen_arms(only: str | None, num_layers: int) -> list[Arm]:
    """The arms to do, the methods first.

    Raises:
      CatVersionError: no such arm or question.
    """
    arms = make_arms(num_layers)
    if only is None:
        return list(arms.values())
    words = _split(only, {*arms, *(arm.question for arm in arms.values())})
    # textual_inversion and dreambooth are arms as well as questions: the arm is meant
    questions = words - set(arms)
    return [arm for arm in arms.values() if arm.name in words or arm.question in questions]


def _split(only: str, known: set[str]) -> set[str]:
    """Names may hold a comma themselves: the longest known ones win."""
    words, rest = set(), only.split(",")
    while rest:
        for count in range(len(rest), 0, -1):
            if (word := ",".join(rest[:count]).strip()) in known:
                words.add(word)
                rest = rest[count:]
                break
        else:
            raise CatVersionError(
                f"--only {rest[0]}: no such arm or question; known are {', '.join(sorted(known))}."
            )
    return words


def make_study(args: argparse.Namespace) -> Study:
    """Load the model and the concepts."""
    cache = Path(args.compilation_cache).expanduser()
    make_folder(cache)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    backbone = load_model(args.model)
    all_concepts = read_concepts(args.concepts)
    concepts = evenly_spread(all_concepts, args.max_concepts)
    protocol = Protocol(
        load_prompt_set(args.prompts),
        args.seeds,
        args.ablation_seeds,
        SamplingSettings(
            sampler=args.sampler,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            batch_size=args.batch_size,
        ),
        args.num_prior_images,
        args.concepts_per_device,
        args.train_steps,
        args.training_seed,
    )
    return Study(
        args.out,
        backbone,
        ClipEmbedder(args.clip or backbone.folder / "clip"),
        None if args.dino is None else DinoEmbedder(embedded_or_given(args.dino)),
        all_concepts,
        concepts,
        evenly_spread(concepts, args.ablation_concepts),
        protocol,
        args.concepts,
    )


def finished(study: Study) -> dict[str, Any]:
    """Arms that are done already with these settings, whichever are to be done now."""
    arms = make_arms(study.backbone.num_text_layers).values()
    found = {arm.name: study.finished(arm) for arm in arms}
    return {name: content for name, content in found.items() if content is not None}


def write_results(study: Study, contents: dict[str, Any], command: str) -> None:
    """``results.json`` and ``results.csv``, of the arms that are done."""
    found = compare(contents)
    for arm, content in contents.items():
        found[arm] |= {
            key: content[key] for key in ("question", "text", "base", "compute", "failed")
        }
        found[arm]["options"] = content["settings"]["options"]
    first = next(iter(contents.values()))
    protocol = {
        "command": command,
        "model": study.backbone.name,
        "concepts": len(study.concepts.concepts),
        "concepts of the ablations": len(study.ablation_concepts.concepts),
        "classes": len(study.classes),
        "prompts": len(study.protocol.prompt_set.prompts),
        "training seed": study.protocol.training_seed,
        "seeds": study.protocol.seeds,
        "seeds of the ablations": study.protocol.ablation_seeds,
        **{k: v for k, v in first["settings"]["sampling"].items() if v is not None},
        "intervals": "95 %, percentile bootstrap over concepts",
        "masks": "of generated images: the plain model's attention to the class word, for all arms",
        "machine": machine(),
        "software": f"catversion_jax {__version__}, jax {jax.__version__}",
    }
    write_json(
        study.out / "results.json",
        {"protocol": protocol, "real": real_images(first), "arms": found},
    )
    write_atomically(study.out / "results.csv", as_csv(found).encode())


def full_command(argv: Sequence[str]) -> str:
    """What makes all of the results, however many times ``--only`` was used on the way."""
    words = list(argv)
    if "--only" in words:
        del words[words.index("--only") : words.index("--only") + 2]
    return shlex.join(["python", "tools/study/run.py", *words])


def as_csv(found: dict[str, Any]) -> str:
    """One line for each arm, set of images, figure, and arm it is compared with."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("arm", "question", "images", "figure", "against", "mean", "low", "high", "concepts")
    )
    for arm, entry in found.items():
        for images in ("total", "first_seed"):
            part = entry[images]
            for against, figures in [("", part["mean"]), *part["against"].items()]:
                for figure, value in figures.items():
                    numbers = ["" if v is None else f"{v:.6f}" for v in value.values()]
                    keys = (arm, entry["question"], images, figure, against)
                    writer.writerow((*keys, *numbers, part["concepts"]))
    return text.getvalue()


def machine() -> str:
    """Where this runs, in words."""
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else ""
    return (
        f"{kind or device.device_kind}, {os.cpu_count()} cores, {jax.device_count()} jax device(s)"
    )


def write_analyses(study: Study) -> None:
    """``analyses.json``: where features are dense, and the attention mass of the main arms."""
    prompt_set, path = study.protocol.prompt_set, study.out / "analyses.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    of_model: dict[str, Any] = {"weights_sha256": study.weights}
    if known.get("weights_sha256") != study.weights:
        of_model["class_share"] = class_shares(study.backbone, study.classes, prompt_set)
        of_model["image_change"] = image_changes(
            study.backbone, study.scorer.clip, study.classes, study.protocol.sampling
        )
    mass = {}
    for arm in ("catversion", "catversion_official", "layers=all"):
        run = study.out / "arms" / arm / "run"
        if run.is_dir():
            mass[arm] = attention_mass(study.backbone, run, prompt_set)
    write_json(path, {**known, **of_model, "attention_mass": mass})


def main(argv: list[str]) -> int:
    """Every arm, then the results."""
    args = parse(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        study = make_study(args)
        write_json(args.out / "source.json", {"concepts": args.concepts})
        arms = chosen_arms(args.only, study.backbone.num_text_layers)
        contents = finished(study)
        try:
            for number, arm in enumerate(arms, start=1):
                started = time.perf_counter()
                logger.info("arm %d of %d: %s", number, len(arms), arm.name)
                contents[arm.name] = study.run(arm)
                logger.info("%s: %.0f s", arm.name, time.perf_counter() - started)
        finally:  # what is done is written, also when the rest was stopped
            if contents:
                write_results(study, contents, full_command(argv))
        write_analyses(study)
    except CatVersionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
