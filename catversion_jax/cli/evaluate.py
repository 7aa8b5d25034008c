"""``catversion evaluate RUN|IMAGES``: draw every prompt of a set, score, and write a report."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from catversion_jax.cli.model_arguments import (
    add_dtype_argument,
    add_sampling_arguments,
    add_source_arguments,
    given_sampling_options,
)
from catversion_jax.cli.paths import path_argument
from catversion_jax.cli.progress import progress
from catversion_jax.config.gate import GateSettings
from catversion_jax.errors import CatVersionError, shown

GATE_FAILED = 4
"""Exit code: every concept was scored, and some fail the gate."""

_GATE_HELP = {
    "rank1": "least share of a concept's pictures that must be nearest to one of its own photos",
    "copies": "largest share of a concept's pictures that may repeat a training photo",
    "text_loss": "how far a concept's text score may be below the plain model's",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; sampling options are those of ``catversion generate``."""
    parser.epilog = (
        "Images of any method are scored from IMAGES/<concept>/<prompt>_<seed>.png (a prompt's "
        "words joined by '-',\nor its number in the set from 0; <prompt>_<seed>.mask.png beside "
        "it, object white) or as catversion generate\nwrote them, one --output_dir per concept. "
        "docs/results/evaluation.md has the definitions."
    )
    add = parser.add_argument
    add("source", metavar="RUN|IMAGES", type=path_argument,
        help="output folder of training, or a folder of images, see below")  # fmt: skip
    add("--clip", help="transformers CLIPModel folder that scores [the model's own clip/ folder]")
    add("--prompts", default="dreambench", metavar="NAME|FILE",
        help="prompt set: dreambench, catversion, tiny, or a .txt or .yaml file in which {} stands "
             "for the class word [dreambench]")  # fmt: skip
    add("--concepts", help="folder or manifest of the training images [the one the run names]")
    add("--base_class", help="base class of concepts that do not name their own")
    add("--holdout", type=int,
        help="number of each concept's last photos that were kept from training, to score against "
             "[as the run says]")  # fmt: skip
    add(
        "--model", help="model that draws, and makes missing masks [the one the run was trained on]"
    )
    add_source_arguments(parser)
    add("--dino",
        help="transformers ViTModel folder (DreamBench: facebook/dino-vits16), or DINOv2, with "
             "registers or without (facebook/dinov2-base), or tiny-sd-judge, which this "
             "package contains, for pictures of tiny-sd's world")  # fmt: skip
    add("--num_images_per_prompt", type=int,
        help="number of images of each prompt [as the prompt set says]")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the first image of every prompt [0]")
    add("--plain", action="store_true",
        help="also draw and score the model without concepts, with the same seeds")  # fmt: skip
    add("--all_steps", action="store_true",
        help="also score the run's intermediate concept files, with the first seed")  # fmt: skip
    add("--num_prior_images", type=int, default=8,
        help="number of images of other classes that are drawn with each concept forced on, to see "
             "what it does to them; 0 draws none [8]")  # fmt: skip
    add("--gallery", action="store_true",
        help="also rank each image among the photos of all concepts of its class: rank-1, mAP, and "
             "which concepts are taken for each other")  # fmt: skip
    add("--scales", default="", metavar="S,S,...",
        help="also draw with these strengths of the concepts, such as 0.4,0.6,0.8,1, with the "
             "first seed, and plot image against text score")  # fmt: skip
    add("--gate", action="store_true",
        help="write the concepts that fail to gate.json, for catversion train retrain=failed; "
             "includes --plain and --gallery; exit code 4 where some fail")  # fmt: skip
    for field in dataclasses.fields(GateSettings):
        add(f"--gate_{field.name}", type=float,
            help=f"{_GATE_HELP[field.name]} [{field.default}]")  # fmt: skip
    add("--dreambench_plus", metavar="FOLDER", type=path_argument,
        help="also write photos, prompts and images into FOLDER in DreamBench++'s layout, for its "
             "judges")  # fmt: skip
    add(
        "--classes",
        help="further class words for the images of other classes, separated by commas, beside "
        "those of the concepts",
    )
    add("--force", action="store_true",
        help="use a concept though it was trained with another text encoder")  # fmt: skip
    add("--output_dir", type=path_argument,
        help="receives scores.csv, scores.json, report.html and images/ "
             "[RUN/evaluation, IMAGES/evaluation]")  # fmt: skip
    add_sampling_arguments(parser, usual_batch_size="4")
    add_dtype_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate; 0 when every concept was scored, 3 when some were left out, 4 when all were scored
    and some fail the gate.
    """
    from catversion_jax.evaluation.evaluate import evaluate
    from catversion_jax.training.run.reader import failed_concepts

    with progress("drawing", "image") as advance:
        evaluation = evaluate(
            args.source,
            prompts=args.prompts,
            concepts=args.concepts,
            base_class=args.base_class,
            holdout=args.holdout,
            model=args.model,
            revision=args.revision,
            variant=args.variant,
            prediction_type=args.prediction_type,
            dtype=args.dtype,
            clip=args.clip,
            dino=args.dino,
            num_images_per_prompt=args.num_images_per_prompt,
            seed=args.seed,
            plain=args.plain,
            all_steps=args.all_steps,
            num_prior_images=args.num_prior_images,
            gallery=args.gallery,
            scales=_numbers(args.scales),
            gate=_gate(args),
            dreambench_plus=args.dreambench_plus,
            classes=(args.classes or "").split(","),
            force=args.force,
            output_dir=args.output_dir,
            on_image=advance,
            **given_sampling_options(args),
        )
    if evaluation.num_images:
        kept = evaluation.num_images - evaluation.num_drawn
        print(f"{evaluation.num_images} images, {kept} of them were there already")
    print(evaluation)
    print("\n" + "\n".join(map(str, evaluation.files)))
    failed = failed_concepts(args.source)
    for path in failed:
        print(f"{path.parent.name}: left out, its training failed: {path}", file=sys.stderr)
    for name, reason in evaluation.left_out.items():
        print(f"{name}: left out: {reason}", file=sys.stderr)
    if failed or evaluation.left_out:
        return 3
    return GATE_FAILED if evaluation.gate is not None and evaluation.gate.failed else 0


def _gate(args: argparse.Namespace) -> GateSettings | bool:
    given = {
        field.name: value
        for field in dataclasses.fields(GateSettings)
        if (value := getattr(args, f"gate_{field.name}")) is not None
    }
    if given and not args.gate:
        raise CatVersionError(
            f"--gate_{next(iter(given))}: says what fails the gate, and there is none. Give --gate "
            "too, or leave it out."
        )
    return args.gate and GateSettings(**given)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise CatVersionError(
            f"--scales {shown(text)}: must be numbers with commas between, such as 0.4,0.6,0.8,1."
        ) from None
