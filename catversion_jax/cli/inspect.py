"""``catversion inspect FILE``: what a concept file is, or which concepts a run directory holds,
without loading any model; with ``--model`` and ``--prompt``, how much of each token's attention the
residual takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from catversion_jax.cli.model_arguments import add_prediction_type_argument
from catversion_jax.cli.paths import path_argument
from catversion_jax.errors import CatVersionError
from catversion_jax.runtime.columns import aligned

if TYPE_CHECKING:
    from catversion_jax.methods.concept_file import Concept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "file",
        metavar="FILE",
        type=path_argument,
        help="concept file or its folder, FILE.arrow#NAME, run directory, or an official adapter",
    )
    parser.add_argument(
        "--json", action="store_true", help="print JSON, with the whole training configuration"
    )
    parser.add_argument(
        "--num_heads",
        type=int,
        default=12,
        help="number of attention heads of the text encoder of an official adapter [12]",
    )
    parser.add_argument("--model", help="with --prompt: model folder, single file or hub id")
    add_prediction_type_argument(parser)
    parser.add_argument(
        "--prompt", help="prompt of which the share of attention that the concept takes is printed"
    )


def run(args: argparse.Namespace) -> int:
    """Print what the file says about itself."""
    from catversion_jax.methods.concept_file import (
        CONCEPT_FILE_NAME,
        concept_folders,
        load_concept,
    )
    from catversion_jax.methods.official_adapter import ADAPTER_FILE_NAME
    from catversion_jax.runtime.concept_packs import SUFFIX
    from catversion_jax.training.run.reader import packed_concepts

    path = args.file
    official = path / ADAPTER_FILE_NAME if path.is_dir() else path
    if official.is_file() and official.suffix == ".bin":
        facts = _official_facts(path, args.num_heads)
    elif path.suffix == SUFFIX and path.is_file():
        return _list_concepts(packed_concepts(path), as_json=args.json)
    elif not (path / CONCEPT_FILE_NAME).is_file() and (folders := concept_folders(path)):
        return _list_concepts(folders, as_json=args.json)
    else:
        facts = _concept_facts(load_concept(path))
    if args.prompt is not None:
        facts["attention_mass"] = _attention_mass(path, args)
    print(json.dumps(facts, indent=2) if args.json else _as_text(facts))
    return 0


def _list_concepts(folders: Sequence[Path], *, as_json: bool) -> int:
    """Print the concepts that can be read, then what is wrong with the others; the exit code."""
    from catversion_jax.training.run.reader import readable_concepts

    concepts, damaged = readable_concepts(folders)
    listed = {str(folder): _concept_facts(concept) for folder, concept in concepts}
    if listed:
        print(json.dumps(listed, indent=2) if as_json else _as_table(listed))
    if damaged:
        raise CatVersionError("\n".join(damaged.values()))
    return 0


def _attention_mass(path: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each token of the prompt in each text encoder: mean over heads, one number per adapted
    layer.
    """
    import numpy as np

    from catversion_jax.methods.attention_mass import residual_attention_mass
    from catversion_jax.methods.concept_file import load_concept
    from catversion_jax.methods.learned import encoder_names
    from catversion_jax.models.stable_diffusion import load_model
    from catversion_jax.sampling.requests import ConceptUse, check_concept, place_concepts

    concept = load_concept(path)
    if not concept.learned.adds_keys:
        raise CatVersionError(
            f"--prompt: {path} is a {concept.learned.kind}: it adds no keys that could take "
            "attention. Give a CatVersion concept."
        )
    backbone = load_model(
        _given(args.model or concept.base_model),
        prediction_type=args.prediction_type,
        dtype="float32",
        max_devices=1,
    )
    use = ConceptUse.of(concept)
    check_concept(backbone, use, concept.fingerprints)
    rows = []
    parts = concept.learned.parts
    for name, encoder, tokenizer, part in zip(
        encoder_names(len(parts)), backbone.text_encoders, backbone.tokenizers, parts, strict=True
    ):
        placed = place_concepts(tokenizer, args.prompt, [use])
        mass = residual_attention_mass(
            encoder, placed.token_ids[None], part, placed.word_places[0][None]
        )  # [L 1 N T]
        mean = np.asarray(mass).mean(axis=2)[:, 0]  # [L T]
        of_encoder = {"encoder": name} if name else {}
        rows += [
            {"token": text, "mass": [round(float(x), 4) for x in mean[:, position]], **of_encoder}
            for position, text in enumerate(tokenizer.texts(placed.token_ids))
        ]
    return rows


def _given(model: str) -> str:
    if not model:
        raise CatVersionError("--prompt: the file does not name its model. Give --model.")
    return model


def _concept_facts(concept: Concept) -> dict[str, Any]:
    return {
        "what": concept.learned.kind,
        "name": concept.name,
        "base_class": concept.base_class,
        "class_forms": list(concept.class_forms),
        "when": concept.when,
        "base_model": concept.base_model,
        **concept.fingerprints,
        "step": concept.step,
        **concept.learned.summary(concept.name),
        "images": list(concept.images),
        "metrics": concept.metrics,
        "train_config": concept.train_config,
    }


def _official_facts(path: Path, num_heads: int) -> dict[str, Any]:
    from catversion_jax.methods.official_adapter import import_official_concept

    return {
        "what": "adapter of the authors' code (convert it with `catversion import`)",
        **import_official_concept(path, num_heads).summary(""),
    }


def _as_table(listed: dict[str, dict[str, Any]]) -> str:
    """One row for each of several concepts."""
    keys = ("name", "base_class", "when", "step")
    rows = [[*(key.replace("_", " ") for key in keys), "folder"]]
    rows += [[*(str(facts[key]) for key in keys), folder] for folder, facts in listed.items()]
    return "\n".join(aligned(rows, left=range(len(rows[0]))))


def _as_text(facts: dict[str, Any]) -> str:
    """Two columns; long or empty things in short."""
    lines = []
    for key, value in facts.items():
        if key == "attention_mass":
            lines.append("attention mass of the residual per adapted layer, mean over heads:")
            lines += [
                f"  {row['token']:<19}{row['mass']} {row.get('encoder', '')}".rstrip()
                for row in value
            ]
            continue
        if key == "train_config":
            chosen = ("learning_rate", "max_train_steps", "train_batch_size", "init", "seed")
            value = {k: value[k] for k in chosen if k in value}
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        lines.append(f"{key.replace('_', ' '):<21}{value if value != '' else '(not stated)'}")
    return "\n".join(lines)
