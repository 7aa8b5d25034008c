"""``catversion fit-start CONCEPTS --out FILE``: a concept encoder, for ``init=predicted``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

from catversion_jax.cli.option_arguments import (
    add_option_arguments,
    given_options,
    refuse_own_options,
    refuse_unused_options,
)
from catversion_jax.cli.paths import path_argument
from catversion_jax.cli.progress import progress
from catversion_jax.config import (
    DataOptions,
    FitOptions,
    MethodOptions,
    ModelOptions,
    ObjectiveOptions,
    as_override,
    load_config,
)
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.atomic_files import check_writable

_ARGUMENTS = {
    "concepts": "CONCEPTS",
    "init": None,
    "start": None,
    "start_clip": "--clip",
    "output_dir": "--out",
    "seed": "--seed",
    "learning_rate": "--learning_rate",
    "max_train_steps": "--num_steps",
    "train_batch_size": "--batch_size",
}
"""Options that the command gives, with its own argument of each."""
_USED = {
    *("preset", "when", "mixed_precision", "num_eval_samples", "compilation_cache_dir"),
    *(
        field.name
        for group in (DataOptions, ModelOptions, MethodOptions, ObjectiveOptions)
        for field in dataclasses.fields(group)
    ),
}
"""Options of training that say something here too."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.usage = "catversion fit-start CONCEPTS --out FILE [--config FILE] [key=value ...]"
    parser.epilog = (
        "key=value: the options of `catversion train` that say how photos are read and what is\n"
        "learned (num_positions, layers, scope, ...). A run that uses the file must have the same\n"
        "ones. Without any they are those of preset=fast."
    )
    add = parser.add_argument
    add("concepts", metavar="CONCEPTS", help="folder or manifest of the concepts to fit on")
    add("overrides", nargs="*", metavar="key=value", help="options that win over the file")
    add(
        "--out",
        required=True,
        type=path_argument,
        metavar="FILE",
        help="the .safetensors file to write",
    )
    add("--config", metavar="FILE", help="YAML file of options")
    add("--clip", metavar="FOLDER", help="CLIPModel that sees the photos [the model's own clip/]")
    add_option_arguments(parser, FitOptions)


def run(args: argparse.Namespace) -> int:
    """Fit; 0, or 3 when some concepts could not be used."""
    refuse_own_options(args.overrides, _ARGUMENTS)
    refuse_unused_options(args.overrides, _USED, "fit-start")
    if args.out.is_dir():
        raise CatVersionError(f"--out {args.out}: is a folder. Give the file to write.")
    check_writable(args.out.parent)
    given = [as_override("concepts", args.concepts), *args.overrides]
    if args.config is None and not any(one.startswith("preset=") for one in given):
        given.insert(0, "preset=fast")
    config = load_config(args.config, [*given, "init=class_word"])

    import jax

    from catversion_jax.concepts import read_configured_concepts
    from catversion_jax.methods.concept_encoder import load_concept_encoder
    from catversion_jax.runtime.compilation import use_compilation_cache
    from catversion_jax.runtime.sharding import make_mesh
    from catversion_jax.training.fit_start import (
        fit_encoder,
        held_out_losses,
        is_held_out,
        read_examples,
    )
    from catversion_jax.training.frozen_networks import load
    from catversion_jax.training.predicted_start import clip_for
    from catversion_jax.training.trainable import check_trainable

    options = FitOptions(**given_options(args, FitOptions))
    started = time.monotonic()
    concepts = read_configured_concepts(config.data_options, config.when)
    use_compilation_cache(config.compilation_cache_dir)
    mesh = make_mesh(1, jax.local_devices())
    backbone = load(config.model_options, config.mixed_precision, mesh)
    check_trainable(backbone)
    clip_name, clip = clip_for(args.clip, backbone)
    method, objective = config.method_options, config.objective_options
    with progress(f"reading {len(concepts.concepts)} concepts", "concept") as advance:
        examples, failures = read_examples(
            concepts.concepts,
            backbone,
            config.data_options,
            method,
            objective,
            clip,
            seed=options.seed,
            on_concept=advance,
        )
    failures |= {problem.name: problem.message for problem in concepts.problems}
    for name, reason in failures.items():
        print(f"  left out {name}: {reason.splitlines()[0]}", file=sys.stderr)
    judges = [one for one in examples if is_held_out(one.name, options.held_out)]
    fitted = [one for one in examples if not is_held_out(one.name, options.held_out)]
    with progress(f"fitting to {len(fitted)} concepts", "step") as advance:
        encoder = fit_encoder(
            fitted,
            backbone,
            mesh,
            method,
            objective,
            options,
            clip_name=clip_name,
            clip=clip,
            on_step=advance,
        )
    file = encoder.save(args.out)
    losses = held_out_losses(
        load_concept_encoder(file),
        judges,
        backbone,
        mesh,
        objective,
        num_eval_samples=config.num_eval_samples,
    )
    print(f"fitted to {len(fitted)} concepts in {time.monotonic() - started:.0f} s")
    if losses.num_concepts:
        print(
            f"evaluation loss of {losses.num_concepts} concepts that were held out: "
            f"{losses.predicted:.4f} predicted, {losses.class_word:.4f} from the class word, "
            f"{losses.plain:.4f} the plain model"
        )
        if not losses.predicted < losses.plain:
            print(
                "The prediction is no better than the plain model: fit on more concepts, or with "
                "more steps.",
                file=sys.stderr,
            )
    print(file)
    return 3 if failures else 0
