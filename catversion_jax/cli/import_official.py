"""``catversion import``: a concept trained with the authors' own code becomes a concept file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from catversion_jax.errors import CatVersionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add(
        "source",
        metavar="PATH",
        help="folder with pytorch_adapter.bin and adapter_config.json, or that .bin",
    )
    add("--base_class", required=True, help="the word it was trained with, such as teapot")
    add("--name", help="[the folder's name]")
    add(
        "--output_dir",
        default="catversion-import",
        help="receives NAME/catversion.safetensors [catversion-import]",
    )
    add(
        "--num_heads", type=int, default=12, help="attention heads of the text encoder [12: SD 1.x]"
    )
    add("--prefix_length", type=int, help="concatenated positions [as adapter_config.json says]")
    add(
        "--when",
        choices=("class_word", "always"),
        default="class_word",
        help="the authors' code acts on every prompt: always [class_word]",
    )
    add(
        "--model",
        default="",
        help="what it was trained on; a local folder also gives the encoder's fingerprint",
    )


def run(args: argparse.Namespace) -> int:
    """Read the adapter without running anything in it, and write the concept file."""
    from catversion_jax.export import CONCEPT_FILE_NAME, save_concept
    from catversion_jax.official_adapter import import_official_concept

    source = Path(args.source)
    name = args.name or (source.resolve() if source.is_dir() else source.resolve().parent).name
    if re.search(r"[/\\]", name) or name in ("", ".", ".."):
        raise CatVersionError(
            f"--name {name!r}: becomes a folder's name. Give one without path separators."
        )
    residual = import_official_concept(source, args.num_heads, prefix_length=args.prefix_length)
    path = save_concept(
        Path(args.output_dir) / name / CONCEPT_FILE_NAME,
        residual,
        base_class=args.base_class,
        name=name,
        when=args.when,
        base_model=args.model,
        text_encoder_sha256=_fingerprint(args.model),
        config={"imported_from": "RoyZhao926/CatVersion"},
    )
    print(
        f"{path}: layers {', '.join(map(str, residual.layers))}, {residual.num_positions} "
        "position(s)"
    )
    return 0


def _fingerprint(model: str) -> str:
    folder = Path(model) / "text_encoder"
    if not model or not folder.is_dir():
        return ""
    from catversion_jax.models.checkpoint import open_checkpoint
    from catversion_jax.models.fingerprint import text_encoder_sha256

    return text_encoder_sha256(open_checkpoint(folder))
