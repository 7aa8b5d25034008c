"""``run.json``: which model and options a run learns with."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax import __version__
from catversion_jax.config import make_config
from catversion_jax.errors import CatVersionError
from catversion_jax.models.weights.variants import TEXT_ENCODERS
from catversion_jax.runtime.atomic_files import write_atomically
from catversion_jax.runtime.regular_files import make_way, read_json_object
from catversion_jax.training.run import names
from catversion_jax.training.run.identity import NETWORKS, changed_networks
from catversion_jax.training.run.records import refused_changes

logger = logging.getLogger(__name__)


def write_manifest(
    root: Path, settings: Mapping[str, Any], counts: Mapping[str, int] | None
) -> None:
    """Write ``run.json``: the run's settings and the number of concepts in each state."""
    content = {"catversion_jax": __version__, **settings}
    if counts is not None:
        content["concepts"] = counts
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    make_way(root / names.RUN_FILE)
    write_atomically(root / names.RUN_FILE, text.encode())


def check_same_run(root: Path, settings: Mapping[str, Any], *, retrains: bool) -> None:
    """Compare with what ``run.json`` says. Of a damaged one nothing is known, and the records of
    the concepts themselves decide.

    Args:
      root: the folder of the run.
      settings: ``base_model``, the text encoders' fingerprints (``text_encoder_sha256`` and the
        like), ``digests`` and ``options`` of now.
      retrains: whether another model is welcome.

    Raises:
      CatVersionError: the run learned with other options or another model.
    """
    old = read_json_object(root / names.RUN_FILE)
    options = old.get("options")
    if not isinstance(options, Mapping) or not _are_options(options):
        logger.warning("%s: is missing or damaged; writing it again", root / names.RUN_FILE)
        old, options = {}, settings["options"]
    model = changed_model(old, settings)
    if model and not retrains:
        raise CatVersionError(
            f"output_dir={root}: {', '.join(model)} since the concepts of this run were trained. "
            "Give another output_dir, put the former model back, or give retrain=changed, which "
            "trains them again."
        )
    before = {**options, "base model": old.get("base_model", settings["base_model"])}
    now = {**settings["options"], "base model": settings["base_model"]}
    if changed := refused_changes(before, now):
        raise CatVersionError(
            f"output_dir={root}: holds a run that learned with other options "
            f"({'; '.join(changed)}). Continue it with its own options (config.resolved.yaml) or "
            "give another output_dir."
        )


def changed_model(old: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """What of the model is not as the ``run.json`` of then says, in words.

    Args:
      old: what that file says; what it lacks counts as unchanged.
      settings: the text encoders' fingerprints and ``digests`` of now.
    """
    changed = changed_networks(old.get("digests"), settings["digests"])
    for name in TEXT_ENCODERS:
        key, word = f"{name}_sha256", f"the model's {NETWORKS[name]} has changed"
        if old.get(key, settings.get(key)) != settings.get(key) and word not in changed:
            changed.append(word)
    return changed


def has_same_settings(root: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``run.json`` says the very settings of now, further updates not allowed."""
    old = read_json_object(root / names.RUN_FILE)
    now = json.loads(json.dumps(settings))
    return all(old.get(key) == value for key, value in now.items())


def _are_options(options: Mapping[str, Any]) -> bool:
    """Whether every value is one that its option can have."""
    try:
        make_config({**options, "concepts": "any"})
    except CatVersionError:
        return False
    return True
