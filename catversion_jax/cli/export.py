"""``catversion export SOURCE``: concept files, baked prompt embeddings, a complete diffusers
folder, or a block for its modular pipelines.

The file of a Textual Inversion concept is what diffusers' ``load_textual_inversion`` reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catversion_jax.cli.model_arguments import add_source_arguments, load_model
from catversion_jax.cli.paths import path_argument
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.concept_packs import accent_form

if TYPE_CHECKING:
    from catversion_jax.methods.concept_file import Concept

FORMATS = ("safetensors", "prompt_embeds", "pipeline", "block")
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("model", "revision", "variant", "prediction_type")),
    "force": False,
    "prompt": [],
    "negative_prompt": "",
    "scale": 1.0,
}
_OF_MODEL = ("model", "revision", "variant", "prediction_type", "force")
_USED = {
    "safetensors": (),
    "prompt_embeds": tuple(_DEFAULTS),
    "pipeline": _OF_MODEL,
    "block": ("model", "force"),
}
"""What each format makes of the arguments; the others are refused."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        type=path_argument,
        help=(
            "run directory, checkpoint (RUN/checkpoints/process-0000/STEP), concept file or its "
            "folder, FILE.arrow of a pack, or FILE.arrow#NAME of a concept in it"
        ),
    )
    add("--format", choices=FORMATS, default="safetensors", help="what is written [safetensors]")
    add(
        "--output_dir",
        type=path_argument,
        default="catversion-export",
        help="folder that receives it; for a pipeline or block, a new one [catversion-export]",
    )
    add(
        "--concept",
        action="append",
        metavar="NAME",
        help="export only this concept; repeatable [all]",
    )
    add(
        "--model", help="model folder, single file or hub id [the one the concepts were trained on]"
    )
    add_source_arguments(parser)
    add("--prompt", action="append", help="prompt_embeds: prompt to encode; repeatable")
    add(
        "--negative_prompt",
        help="prompt_embeds: negative prompt, on which no concept acts",
    )
    add("--scale", type=float, help="prompt_embeds: strength of the concepts [1]")
    add(
        "--force",
        action="store_true",
        help="export concepts though they were trained with another text encoder",
    )
    parser.set_defaults(**_DEFAULTS)


def run(args: argparse.Namespace) -> int:
    """Write what was asked for and say where."""
    output = args.output_dir
    if args.format == "prompt_embeds" and not args.prompt:
        raise CatVersionError(
            "--format prompt_embeds: embeddings are of fixed prompts. Give at least one --prompt."
        )
    for name, default in _DEFAULTS.items():
        if name not in _USED[args.format] and getattr(args, name) != default:
            raise CatVersionError(
                f"--{name}: says nothing of --format {args.format}. Leave it out, or give the "
                f"--format it is for: {', '.join(f for f in FORMATS if name in _USED[f])}."
            )
    from catversion_jax.training.run.reader import read_trained

    found, damaged = read_trained(args.source)
    for name, reason in damaged.items():
        print(f"{name}: left out: {reason}", file=sys.stderr)
    concepts = _chosen(found, args.concept, args.source)
    if args.format == "safetensors":
        from catversion_jax.methods.concept_file import write_concepts

        for path in write_concepts(concepts, output):
            print(path)
    elif args.format == "prompt_embeds":
        print(_write_prompt_embeds(args, concepts, output / "prompt_embeds.safetensors"))
    elif args.format == "block":
        from catversion_jax.integrations.block_folder import export_block

        _check_exportable(args.format, concepts)
        print(export_block(output, concepts, model=args.model, force=args.force))
    else:
        print(_write_pipeline(args, concepts, output))
    return 3 if damaged else 0


def _chosen(concepts: list[Concept], names: Sequence[str] | None, source: Path) -> list[Concept]:
    if names is None:
        return concepts
    by_name = {concept.name: concept for concept in concepts}
    chosen: dict[str, Concept] = {}
    for name in names:
        if (known := accent_form(name, by_name)) is None:
            raise CatVersionError(
                f"--concept {name}: not in {source}, which holds {', '.join(by_name)}."
            )
        chosen[known] = by_name[known]
    return [*chosen.values()]


def _write_prompt_embeds(args: argparse.Namespace, concepts: Sequence[Concept], path: Path) -> Path:
    from catversion_jax.integrations.prompt_embeds import export_prompt_embeds
    from catversion_jax.sampling.requests import ConceptUse, check_concept

    backbone = load_model(args, _model_of(args, concepts), dtype="float32")
    uses = [ConceptUse.of(concept, scale=args.scale) for concept in concepts]
    for concept, use in zip(concepts, uses, strict=True):
        check_concept(backbone, use, concept.fingerprints, force=args.force)
    return export_prompt_embeds(
        path, backbone, args.prompt, uses, negative_prompt=args.negative_prompt
    )


def _write_pipeline(args: argparse.Namespace, concepts: Sequence[Concept], output: Path) -> Path:
    from catversion_jax.integrations.pipeline_folder import check_parts, export_pipeline
    from catversion_jax.models.stable_diffusion import check_weights
    from catversion_jax.models.weights.fingerprint import encoder_hashes
    from catversion_jax.models.weights.model_files import open_model

    _check_exportable(args.format, concepts)
    files = open_model(
        _model_of(args, concepts),
        revision=args.revision,
        variant=args.variant,
        prediction_type=args.prediction_type,
    )
    check_parts(files, concepts)
    check_weights(files)
    for name in files.text_encoders:
        ours = encoder_hashes(files.tensors(name))
        for concept in concepts:
            trained = concept.fingerprints[f"{name}_sha256"]
            if trained and ours.agrees_with(trained) is False and not args.force:
                raise CatVersionError(
                    f"concept {concept.name!r}: trained with the {name} {trained[:12]} of "
                    f"{concept.base_model}, {files.path} has {ours.sha256[:12]}. Give the right "
                    "--model, or --force."
                )
    return export_pipeline(output, files, concepts, force=args.force)


def _check_exportable(form: str, concepts: Sequence[Concept]) -> None:
    for concept in concepts:
        if obstacle := concept.learned.pipeline_obstacle:
            raise CatVersionError(f"--format {form}: concept {concept.name!r} {obstacle}")


def _model_of(args: argparse.Namespace, concepts: Sequence[Concept]) -> str:
    from catversion_jax.sampling.concept_shelf import base_model

    return args.model or base_model(concepts)
