"""``catversion teach PHOTOS... --base_class teapot``: one concept in one command."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from catversion_jax.cli import train
from catversion_jax.cli.option_arguments import option_of, refuse_own_options
from catversion_jax.cli.paths import path_argument
from catversion_jax.concepts.class_words import LONGEST_WORDS, are_plain_words
from catversion_jax.concepts.layouts import read_entries
from catversion_jax.concepts.names import check_concept_name
from catversion_jax.config import DataOptions, as_override, load_config
from catversion_jax.config.method import START_FILE, UPDATES_AFTER_PREDICTION
from catversion_jax.config.presets import PRESETS
from catversion_jax.errors import CatVersionError, listed, shown
from catversion_jax.runtime.atomic_files import make_folder, write_atomically
from catversion_jax.runtime.bucket_paths import as_path, embedded_or_given
from catversion_jax.runtime.shards import WHOLE

_ARGUMENTS = {
    "concepts": "PHOTOS",
    "base_class": "--base_class",
    "pretrained_model_name_or_path": "--model",
    "output_dir": "--output_dir",
    "max_train_steps": "--updates",
    "start": "--start",
    "shard": None,
}
"""Options that the command gives, with its own argument of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.usage = "catversion teach PHOTOS... --base_class WORD [--model MODEL] [key=value ...]"
    parser.epilog = (
        "This is `catversion train` with preset=quality, which makes the masks that photos lack.\n"
        "preset=fast is quicker and less alike: where the model has a concept encoder, it starts\n"
        "with init=predicted and the options that the encoder was fitted with. key=value gives\n"
        "further options of `catversion train`."
    )
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTOS", help="3 to 10 photos, or the folder they are in")
    add("--base_class", required=True, metavar="WORD", help="what the thing is, such as teapot")
    add("--model", default="tiny-sd", help="model folder, single file or hub id [tiny-sd]")
    add("--name", help="name of the concept [the folder's name, or the base class]")
    add(
        "--output_dir",
        type=path_argument,
        metavar="FOLDER",
        help="folder that receives the result [taught/NAME]",
    )
    add(
        "--start",
        type=path_argument,
        metavar="FILE",
        help="file of a concept encoder, as `catversion fit-start` writes it, for preset=fast [the "
        "model's own]",
    )
    add(
        "--updates",
        type=int,
        help="number of optimizer updates [those of the preset: 200; 25 from a prediction]",
    )


def run(args: argparse.Namespace) -> int:
    """Train; the exit codes are those of ``catversion train``."""
    photos = [one for one in args.photos if "=" not in one or Path(one).exists()]
    options = [one for one in args.photos if one not in photos]
    refuse_own_options(options, _ARGUMENTS)
    if not photos:
        raise CatVersionError("PHOTOS: none given. Give 3 to 10 photos, or the folder they are in.")
    words = " ".join(args.base_class.split())
    if not are_plain_words(words, LONGEST_WORDS):
        raise CatVersionError(
            f"--base_class {shown(args.base_class)}: must be plain words such as 'teapot'."
        )
    folder = _folder(photos)
    known = None if folder is None else _name_of(folder)
    name = args.name or known or words.replace(" ", "_")
    if mistake := check_concept_name(name, "Give another --name."):
        raise CatVersionError(mistake)
    output = as_path(args.output_dir or Path("taught") / name)
    given = [
        f"shard={WHOLE}",
        as_override("pretrained_model_name_or_path", args.model),
        as_override("output_dir", str(output)),
        *_concepts(photos, folder, name, words, output, is_known=name == known),
        *_recipe(args, options),
        *options,
    ]
    code = train.run(argparse.Namespace(config=None, overrides=given))
    if code == 0:
        file = output / "concepts" / name / "catversion.safetensors"
        article = "an" if words[:1].lower() in tuple("aeiou") else "a"
        command = ("catversion", "generate", "--model", args.model, "--concept", str(file))
        prompt = ("--prompt", f"{article} {words} on the beach")
        print(f"{file}\nDraw it: {shlex.join((*command, *prompt))}")
    return code


def _preset(options: Sequence[str], *, with_start: bool) -> str:
    """The preset that ``options`` name; else the closest one that goes with them."""
    given = {option_of(one): one.partition("=")[2] for one in options}
    other = with_start or given.get("init") == "predicted" or "method" in given
    return given.get("preset", "fast" if other else "quality")


def _recipe(args: argparse.Namespace, options: Sequence[str]) -> list[str]:
    """What is learned, and how long."""
    preset = _preset(options, with_start=args.start is not None)
    start = as_path(args.start) if args.start else None
    if start is None and preset == "fast":
        start = own_start(args.model)
        if start and (other := _unlike(start, options)):
            print(f"{other}: not from the prediction of {args.model}, which does not fit that.")
            start = None
    updates = usual_updates(start, preset) if args.updates is None else args.updates
    return [
        f"preset={preset}",
        f"max_train_steps={updates}",
        f"validation_steps={updates or 'null'}",
        f"eval_steps={max(1, updates)}",
        *(start_options(start) if start else []),
    ]


def own_start(model: str) -> Path | None:
    """The concept encoder that a model folder has of its own; None where it has none."""
    file = embedded_or_given(model) / START_FILE
    return file if file.is_file() else None


def usual_updates(start: Path | None, preset: str) -> int:
    """Few after a prediction, else those of the preset."""
    if start:
        return UPDATES_AFTER_PREDICTION
    return load_config(None, ["concepts=photos", f"preset={preset}"]).max_train_steps


def _unlike(start: Path, options: Sequence[str]) -> str | None:
    """The first of the options of a run that a concept encoder was not fitted for."""
    fitted = {"method": "catversion", **dict(one.split("=", 1) for one in start_options(start))}
    for one in options:
        name, value = option_of(one), one.partition("=")[2]
        asked: dict[str, object] = {name: value}
        if name == "preset":
            # every preset has a start, which the prediction takes the place of
            asked = {k: v for k, v in PRESETS.get(value, {}).items() if k != "init"}
        if any(fitted.get(key, str(asked[key])) != str(asked[key]) for key in asked):
            return one
    return None


def start_options(file: Path) -> list[str]:
    """The options of a run that starts from a prediction: those that the concept encoder was fitted
    with, as key=value.

    Raises:
      CatVersionError: the file is no concept encoder.
    """
    from catversion_jax.methods.concept_encoder import load_concept_encoder

    fitted = load_concept_encoder(file).options
    return [
        "init=predicted",
        as_override("start", str(file)),
        *(f"{k}={v}" for k, v in fitted.items()),
    ]


def _folder(photos: list[str]) -> Path | None:
    """The one folder that was given; None where photos were.

    Raises:
      CatVersionError: a folder stands beside something else.
    """
    folders = [photo for photo in photos if Path(photo).is_dir()]
    if folders and len(photos) > 1:
        raise CatVersionError(
            f"PHOTOS {shown(folders[0])}: is a folder. Give one folder, or photos alone."
        )
    return Path(folders[0]) if folders else None


def _name_of(folder: Path) -> str:
    """What the concept of a folder is called.

    Raises:
      CatVersionError: it holds several, or none.
    """
    entries = read_entries(
        folder,
        dataset_split=DataOptions.dataset_split,
        image_column=DataOptions.image_column,
        concept_column=None,
        base_class_column=None,
    ).entries
    if len(entries) == 1:
        return entries[0].name
    names = ", ".join(listed([shown(entry.name)[1:-1] for entry in entries]))
    raise CatVersionError(
        f"PHOTOS {shown(str(folder))}: holds {len(entries)} concepts ({names}). Give the folder of "
        f"one, or teach all of them: catversion train preset=fast concepts={folder}"
    )


def _concepts(
    photos: list[str],
    folder: Path | None,
    name: str,
    base_class: str,
    output: Path,
    *,
    is_known: bool,
) -> list[str]:
    """The options that name the photos: through a list of them that lies beside the result, unless
    the concept of the folder ``is_known`` by this name.
    """
    if folder is not None and is_known:
        return [as_override("concepts", str(folder)), as_override("base_class", base_class)]
    entry: dict[str, object] = {"name": name, "base_class": base_class}
    if folder is not None:
        entry["path"] = str(folder.absolute())
    else:
        entry["images"] = [str(Path(image).absolute()) for image in photos]
    make_folder(output)
    write_atomically(output / "photos.json", (json.dumps([entry], indent=2) + "\n").encode())
    return [as_override("concepts", str(output / "photos.json"))]
