"""Where a model's folder is: a path on this machine, the embedded model's name, or a Hugging Face
hub id that is downloaded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from catversion_jax.assets import EMBEDDED_MODEL
from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.weights.addresses import address_remedy, moved
from catversion_jax.models.weights.model_index import component_class, read_model_index
from catversion_jax.models.weights.other_models import check_is_stable_diffusion
from catversion_jax.models.weights.safetensors_files import (
    PICKLED,
    STEMS,
    missing_weights,
    shard_patterns,
    weight_files,
)
from catversion_jax.models.weights.variants import (
    COMPONENTS,
    SECOND_TEXT_ENCODER,
    TOKENIZERS,
    components_of,
    weights_of,
    without_variant,
)
from catversion_jax.runtime.bucket_paths import embedded_or_given

FILES_EXPECTED = "model_index.json, text_encoder/, unet/, vae/, tokenizer/ and scheduler/"

ALL_COMPONENTS = (*COMPONENTS, *SECOND_TEXT_ENCODER)

WEIGHT_FILES = (".safetensors", *PICKLED)
"""Endings of single-file checkpoints."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate_model(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    weights: bool = True,
) -> Path:
    """The local folder of a Stable Diffusion; ``tiny-sd`` ships with the package, a hub id is
    downloaded, without its weights where these are not asked for.

    Raises:
      CatVersionError: no such folder, not a diffusers folder, or it cannot be downloaded.
    """
    path = embedded_or_given(model)
    if not path.exists() and (remedy := address_remedy(str(model))):
        raise CatVersionError(f"{model}: {remedy}")
    if path.is_file():
        raise CatVersionError(
            f"{model}: is a single file; a diffusers folder ({FILES_EXPECTED}) is needed here. "
            "Convert it once in PyTorch: "
            "diffusers.StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)."
        )
    if path.suffix in WEIGHT_FILES and not path.exists():
        raise CatVersionError(f"{model}: the file does not exist. Check the path.")
    if path.is_dir():
        folder = path
    elif isinstance(model, str) and HUB_ID.fullmatch(model):
        folder = _download(model, revision, variant, weights)
    else:
        raise CatVersionError(
            f"{model}: the folder does not exist, and this is not a hub id such as "
            f"'stable-diffusion-v1-5/stable-diffusion-v1-5' nor {EMBEDDED_MODEL!r}. Check the path."
        )
    _check_components(folder)
    return folder


def _check_components(folder: Path) -> None:
    try:
        found = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CatVersionError(
            f"{folder}: cannot be read ({error.strerror}). Allow it, or give another folder."
        ) from error
    if "model_index.json" not in found:
        raise CatVersionError(
            f"{folder}: is not a diffusers folder; expected {FILES_EXPECTED}, found {found}. Give "
            "the folder that holds model_index.json."
        )
    index = read_model_index(folder)
    check_is_stable_diffusion(folder, index)
    components = components_of(folder)
    tokenizers = [TOKENIZERS[name] for name in components if name in TOKENIZERS]
    needed = (*components, *tokenizers, "scheduler")
    missing = [name for name in needed if not (folder / name).is_dir()]
    if missing:
        raise CatVersionError(
            f"{folder}: missing component {', '.join(missing)}; expected {FILES_EXPECTED}, found "
            f"{found}. Download the model again."
        )
    for name, expected in components.items():
        actual = component_class(index, name)
        if actual not in (None, expected, f"Flax{expected}"):
            raise CatVersionError(
                f"{folder}: its {name} is a {actual}, must be a {expected}. Use a Stable Diffusion "
                "1.x, 2.x or XL model."
            )


def _download(model: str, revision: str | None, variant: str | None, weights: bool) -> Path:
    patterns = ["model_index.json", "scheduler/*", *(f"{name}/*" for name in TOKENIZERS.values())]
    patterns += [f"{name}/config.json" for name in ALL_COMPONENTS]
    folder = _snapshot(model, revision, patterns)
    if not weights:
        return folder
    _check_components(folder)  # before gigabytes of another architecture are here
    folder = _snapshot(model, revision, [*patterns, *_weight_patterns(ALL_COMPONENTS, variant)])
    if plain := without_variant(folder, variant):
        folder = _snapshot(model, revision, _weight_patterns(plain, None))
    _check_downloaded(model, folder, revision, variant)
    return folder


def _weight_patterns(components: Iterable[str], variant: str | None) -> list[str]:
    files = [
        file
        for stem in STEMS
        for file in (*weight_files(stem, variant), *shard_patterns(stem, variant))
    ]
    return [f"{name}/{file}" for name in components for file in files]


def _snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Download the files of a hub model that match ``patterns``; the local folder."""
    import huggingface_hub
    from huggingface_hub import errors

    hint = moved(model)
    try:
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
        )
    except errors.GatedRepoError as error:
        raise CatVersionError(
            f"{model}: access is restricted. Accept the terms on https://huggingface.co/{model} "
            "and log in with 'hf auth login'."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CatVersionError(
            f"{model}: has no revision {revision!r}. See https://huggingface.co/{model}/tree/main "
            "for branches."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CatVersionError(
            f"{model}: neither a folder here nor a model on the Hugging Face hub.{hint} Check the "
            "spelling; for a private model log in with 'hf auth login'. Models are taken down at "
            "times: look for a copy at https://huggingface.co/models?search="
            f"{model.split('/')[1]}, or give a .safetensors file."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CatVersionError(
            f"{model}: neither a folder here nor a complete download in the Hugging Face cache, "
            f"and the hub cannot be reached (offline, or HF_HUB_OFFLINE is set).{hint} Connect "
            "once, or give a local folder."
        ) from error
    except errors.HfHubHTTPError as error:
        refused = getattr(error.response, "status_code", None) in (401, 403)
        remedy = "Log in again with 'hf auth login'" if refused else "Try again"
        raise CatVersionError(
            f"{model}: cannot be downloaded ({shown(error)}).{hint} {remedy}, or give a local "
            "folder."
        ) from error
    except (OSError, ValueError) as error:
        raise CatVersionError(
            f"{model}: cannot be downloaded ({error}).{hint} Try again, or give a local folder."
        ) from error


def _check_downloaded(model: str, folder: Path, revision: str | None, variant: str | None) -> None:
    """Refuse a download without the wanted weights, and list what the hub has instead."""
    fall_back = without_variant(folder, variant)
    for name in components_of(folder):
        wanted = weights_of(variant) | (weights_of(None) if name in fall_back else set())
        here = {path.name for path in (folder / name).glob("*")}
        if (folder / name).is_dir() and not here & wanted:
            paths = [PurePosixPath(path) for path in _hub_listing(model, revision)]
            listed = {path.name for path in paths if path.parent == PurePosixPath(name)}
            raise CatVersionError(
                missing_weights(f"{model}, {name}", sorted(listed | here), variant)
            )


def _hub_listing(model: str, revision: str | None) -> list[str]:
    """All files of a hub model; empty where the hub cannot be asked."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return huggingface_hub.HfApi().list_repo_files(model, revision=revision)
    except (OSError, errors.OfflineModeIsEnabled):
        return []
