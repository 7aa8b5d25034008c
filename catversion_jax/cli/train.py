"""``catversion train --config FILE [key=value ...]``, the same as ``python train_tpu.py``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from catversion_jax.cli.progress import progress
from catversion_jax.cli.terminal import SAVED
from catversion_jax.config import TrainConfig, load_config, option_table, with_shard
from catversion_jax.config.sampling import grid_settings
from catversion_jax.errors import CatVersionError, counted
from catversion_jax.models.weights.hub_concept import check_repo_id
from catversion_jax.runtime.bucket_paths import embedded_or_given, home_expanded
from catversion_jax.runtime.shards import WHOLE

if TYPE_CHECKING:
    from catversion_jax.concepts import ConceptList
    from catversion_jax.concepts.long_lists import LongList
    from catversion_jax.evaluation.tables import Evaluation
    from catversion_jax.training.start import TrainResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command; the options themselves are listed from the config's own table."""
    parser.usage = "catversion train --config FILE [key=value ...]"
    parser.epilog = "Every option can stand in the YAML file, or as key=value, or as --key value."
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; see configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="options that win over the file"
    )
    for option in option_table():
        shown = f"{option.help} [{option.default}]" if option.default else option.help
        parser.add_argument(
            f"--{option.name}", metavar="", default=argparse.SUPPRESS, help=shown.replace("%", "%%")
        )


def run(args: argparse.Namespace) -> int:
    """Train; 0 when every concept succeeded, ``quarantine_exit_code`` (3) when some were given up,
    75 when SIGTERM (or Ctrl-C) came first: everything under way is saved, and the same command goes
    on.
    """
    given = [f"{o.name}={vars(args)[o.name]}" for o in option_table() if o.name in vars(args)]
    config = with_shard(load_config(args.config, [*args.overrides, *given]), os.environ)
    # Before jax is imported: the paths can be wrong, and that should show at once.
    from catversion_jax.concepts.long_lists import open_configured_concepts

    if config.push_to_hub and config.hub_model_id:
        check_repo_id(config.hub_model_id)
        if config.shard != str(WHOLE):
            raise CatVersionError(
                f"push_to_hub=true: this process trains shard {config.shard} only, and the last "
                "shard's card would replace the others'. Leave it out, and when all are done push "
                f"once: catversion push {config.output_dir} --repo_id {config.hub_model_id}"
            )
    concepts = open_configured_concepts(config.data_options, config.when)
    _announce(config, concepts)

    from catversion_jax.training.start import train

    if config.evaluate_after:
        _check_clip(config)
    with _stop_signals() as stop:
        result = train(config, concepts=concepts, stop=stop)
    code = _report(result, config.quarantine_exit_code)
    if config.evaluate_after and result.finished and not result.interrupted:
        _evaluate(config, result)
    if config.push_to_hub and config.hub_model_id and result.finished and not result.interrupted:
        _push(config.hub_model_id, config.hub_private_repo, result)
    return code


def _push(repo_id: str, private: bool, result: TrainResult) -> None:
    """Send what was learned to the hub; where that fails, say how to do it later."""
    import jax

    from catversion_jax.training.run.hub_push import plan_push

    if jax.process_index() > 0:
        return
    try:
        print(plan_push(result.output_dir, repo_id).send(private=private))
    except CatVersionError as error:
        again = f"catversion push {result.output_dir} --repo_id {repo_id}"
        again += " --private" if private else ""
        print(f"trained, but not pushed: {error}\nTry `{again}`.", file=sys.stderr)


def _check_clip(config: TrainConfig) -> None:
    """That there is something to score with, before anything is trained."""
    from catversion_jax.models.embedders import own_clip

    model, clip = config.pretrained_model_name_or_path, config.evaluation_clip
    if clip is not None:
        if not (home_expanded(clip) / "config.json").is_file():
            raise CatVersionError(
                f"evaluation_clip={clip}: holds no config.json, must be the folder of a "
                "transformers CLIPModel. Check the path."
            )
    elif own_clip(embedded_or_given(model)) is None:
        raise CatVersionError(
            f"evaluate_after=true: {model} has no clip/ folder of its own to score with. Give "
            "evaluation_clip=FOLDER of a transformers CLIPModel (hf download "
            "openai/clip-vit-base-patch32 --local-dir FOLDER), or leave evaluate_after out and "
            f"evaluate later: catversion evaluate {config.output_dir} --clip FOLDER"
        )


def _evaluate(config: TrainConfig, result: TrainResult) -> None:
    """Draw and score what was learned, with the networks that are loaded already.

    The exit code is training's: an evaluation that cannot be done leaves it as it is.
    """
    import jax

    again = f"catversion evaluate {result.output_dir}"
    again += f" --clip {config.evaluation_clip}" if config.evaluation_clip else ""
    if jax.process_count() > 1:  # the others would wait, and give up, at the end
        print(f"several processes trained this run: `{again}` evaluates it", file=sys.stderr)
        return
    try:
        evaluation = _evaluated(config, result)
    except CatVersionError as error:
        print(f"trained, but not evaluated: {error}\nTry `{again}`.", file=sys.stderr)
        return
    print(evaluation)
    print(evaluation.files[-1])


def _evaluated(config: TrainConfig, result: TrainResult) -> Evaluation:
    from catversion_jax.evaluation.evaluate import evaluate

    settings = grid_settings(
        config.validation_inference_steps,
        config.validation_guidance_scale,
        result.backbone.drawing_defaults,
    )
    with progress("drawing", "image") as advance:
        return evaluate(
            result.output_dir,
            clip=config.evaluation_clip,
            prompts=config.evaluation_prompts,
            model=result.backbone,
            num_images_per_prompt=1,
            plain=True,
            report=result.output_dir / "report.html",
            on_image=advance,
            sampler=settings.sampler,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        )


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first Ctrl-C set; the second one ends the process as usual."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # on a line of its own, below the progress bar
        print(f"\n{signal.Signals(number).name}: saving what is under way", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may listen
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(config: TrainConfig, concepts: ConceptList | LongList) -> None:
    from catversion_jax.concepts.long_lists import LongList

    if isinstance(concepts, LongList):
        print(f"{len(concepts.names)} concepts from {config.concepts}, each read in its turn")
        for line in concepts.notes:
            print(f"  {line}")
        return
    num_images = sum(len(spec.images) for spec in concepts.concepts)
    part = "" if config.shard == str(WHOLE) else f" (shard {config.shard})"
    print(
        f"{counted(len(concepts.concepts), 'concept')}, {num_images} images from "
        f"{config.concepts}{part}"
    )
    for line in concepts.skipped:
        print(f"  skipped {line}")
    for line in concepts.notes:
        print(f"  {line}")
    for spec in concepts.concepts:
        for line in (*spec.warnings, *spec.notes):
            print(f"  {spec.name}: {line}")
    for problem in concepts.problems:
        print(f"  {problem.name}: left out: {problem.message.splitlines()[0]}", file=sys.stderr)


def _report(result: TrainResult, quarantine_exit_code: int) -> int:
    print(f"{counted(len(result.finished), 'concept')} in {result.output_dir / 'concepts'}")
    if result.interrupted:
        print("interrupted; what is under way is saved. The same command goes on.")
        return SAVED
    if not result.failures:
        return 0
    print(f"{len(result.failures)} quarantined (their FAILED.txt says why):", file=sys.stderr)
    for name, reason in result.failures.items():
        print(f"  {name}: {reason.splitlines()[0]}", file=sys.stderr)
    return quarantine_exit_code
