"""``catversion import``: a concept trained with the authors' own code becomes a concept file."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from catversion_jax.cli.paths import path_argument
from catversion_jax.concepts import check_concept_name
from catversion_jax.concepts.fields import WHEN
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.bucket_paths import absolute

if TYPE_CHECKING:
    from catversion_jax.methods.residual import KVResidual

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add = parser.add_argument
    add(
        "source",
        metavar="PATH",
        type=path_argument,
        help="folder with pytorch_adapter.bin and adapter_config.json, or that .bin",
    )
    add("--base_class", required=True, help="the word it was trained with, such as teapot")
    add("--name", help="name of the concept [the folder's name]")
    add(
        "--output_dir",
        type=path_argument,
        default="catversion-import",
        help="receives NAME/catversion.safetensors [catversion-import]",
    )
    add(
        "--num_heads",
        type=int,
        default=12,
        help="number of attention heads of the text encoder [12, as in Stable Diffusion 1.x]",
    )
    add(
        "--prefix_length",
        type=int,
        help="number of key/value pairs in each layer [as adapter_config.json says]",
    )
    add(
        "--when",
        choices=WHEN,
        default="class_word",
        help="prompts that the concept acts on: those with the class word, or all, as in the "
        "authors' code [class_word]",
    )
    add(
        "--model",
        default="",
        help="model that the adapter was trained on; of a local folder or file the concept also "
        "gets the text encoder's fingerprint",
    )
    add("--variant", help="variant of that folder's weight files, for example fp16")


def run(args: argparse.Namespace) -> int:
    """Read the adapter without running anything in it, and write the concept file."""
    from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, save_concept
    from catversion_jax.methods.official_adapter import import_official_concept

    source = args.source
    folder = absolute(source if source.is_dir() else source.parent)
    name = folder.name if args.name is None else args.name
    if mistake := check_concept_name(name, remedy="Give another --name."):
        raise CatVersionError(mistake)
    residual = import_official_concept(source, args.num_heads, prefix_length=args.prefix_length)
    path = save_concept(
        args.output_dir / name / CONCEPT_FILE_NAME,
        residual,
        base_class=args.base_class,
        name=name,
        when=args.when,
        base_model=args.model,
        text_encoder_sha256=_fingerprint(args.model, args.variant, residual),
        config={"imported_from": "RoyZhao926/CatVersion"},
    )
    print(
        f"{path}: layers {', '.join(map(str, residual.layers))}, {residual.num_positions} "
        "position(s)"
    )
    return 0


def _fingerprint(model: str, variant: str | None, residual: KVResidual) -> str:
    """The fingerprint of a local text encoder, which ``residual`` must fit; empty, with a warning,
    where it is not known.
    """
    path = Path(model).expanduser()
    if not model or not path.exists():
        what = f"--model {model}: not here" if model else "no --model"
        logger.warning(
            "%s, so the concept file states no fingerprint of the text encoder it was trained with "
            "and is not checked against the model it is used with; give --model a local diffusers "
            "folder or single file for that",
            what,
        )
        return ""
    from catversion_jax.models.clip.text import CLIPTextConfig
    from catversion_jax.models.weights.fingerprint import text_encoder_sha256
    from catversion_jax.models.weights.model_files import opened
    from catversion_jax.models.weights.safetensors_files import open_checkpoint

    files, name = opened(path), "text_encoder"
    if path.is_file() or (path / name / "config.json").is_file():
        config = CLIPTextConfig.from_hf(files.config(name), source=files.config_source(name))
        heads, layers = config.num_attention_heads, config.num_hidden_layers
        head_dim = config.hidden_size // heads
        try:
            residual.check_fits(heads, head_dim, range(layers))
        except CatVersionError as error:
            raise CatVersionError(
                f"--model {model}: its text encoder has {heads} heads x {head_dim} and layers "
                f"0..{layers - 1}, the adapter {residual.shape_text}. Give the model that it was "
                "trained on, and as --num_heads the number of that model's heads."
            ) from error
    if path.is_file():
        return text_encoder_sha256(files.tensors(name))
    return text_encoder_sha256(open_checkpoint(path / name, variant=variant))
