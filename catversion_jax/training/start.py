"""``catversion_jax.train``: from a config to trained concepts."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from catversion_jax.concepts import ConceptList, read_configured_concepts
from catversion_jax.config import TrainConfig
from catversion_jax.errors import CatVersionError
from catversion_jax.models.stable_diffusion import Backbone, default_dtype, load_backbone
from catversion_jax.runtime.atomic_files import check_writable, unwritable
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.compilation import use_compilation_cache
from catversion_jax.runtime.processes import join_processes
from catversion_jax.runtime.sharding import make_mesh, replicated
from catversion_jax.training import loop
from catversion_jax.training.planning.fitting import fitted
from catversion_jax.training.run.reader import TrainedConcept, read_trained_concept

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a call of :func:`train` left behind.

    Attributes:
      output_dir: the folder of the run.
      concepts: the concepts of the list that are finished, in its order.
      failures: reasons of the concepts that were given up, by name.
      interrupted: whether the run was asked to stop before the others were done; the same config
        continues it.
      backbone: the frozen networks, for drawing without loading them again.
    """

    output_dir: Path
    concepts: tuple[TrainedConcept, ...]
    failures: Mapping[str, str]
    interrupted: bool
    backbone: Backbone = dataclasses.field(repr=False)

    @property
    def finished(self) -> tuple[str, ...]:
        """Names of the finished concepts."""
        return tuple(concept.name for concept in self.concepts)


def train(
    config: TrainConfig,
    *,
    concepts: ConceptList | None = None,
    backbone: Backbone | None = None,
    stop: threading.Event | None = None,
) -> TrainResult:
    """Train every concept of a list at once, or continue the run in ``config.output_dir``.

    Progress goes to ``logging`` and to a bar on stderr. No signal handlers are installed: a caller
    that wants Ctrl-C to save first sets ``stop``. JAX's compilation cache is set as the config
    says, and with float32 the precision of matrix products, both for the whole process.

    Args:
      config: the options, from ``TrainConfig(...)`` or ``load_config(...)``.
      concepts: the concepts, as ``read_concepts`` returns them; None reads them where the config
        says.
      backbone: frozen networks that are loaded already; None loads those that the config names.
      stop: once it is set, everything under way is saved and the function returns.

    Returns:
      The finished concepts with their files and losses, and the reasons of those that failed.

    Raises:
      CatVersionError: there is no concept, the model cannot be used, the options contradict it or
        the run in ``output_dir``, or ``output_dir`` cannot be written. The message says the value,
        the rule and the remedy. A concept that fails is no error: see ``TrainResult.failures``.

    Example:
      >>> import catversion_jax as cv
      >>> result = cv.train(cv.load_config("quickstart", ["max_train_steps=100"]))
      >>> result.concepts[0].file
      PosixPath('catversion-out/concepts/...')
    """
    if concepts is None:
        concepts = read_configured_concepts(config.data_options, config.when)
    root = as_path(config.output_dir)
    check_writable(root)
    use_compilation_cache(config.compilation_cache_dir)
    join_processes(config.coordinator_address, config.num_processes, config.process_id)
    mesh = make_mesh(config.data_parallel, jax.local_devices())
    backbone = _load(config, mesh) if backbone is None else _placed(config, backbone, mesh)
    dtype = _dtype_of(backbone)
    # What "auto" and "the model's own" mean here is part of what is learned: recorded as such.
    config = dataclasses.replace(
        config,
        mixed_precision="bf16" if dtype == "bfloat16" else "no",
        resolution=config.resolution or backbone.default_resolution,
    )
    config = fitted(config, backbone, mesh, concepts.concepts)
    try:
        outcome = loop.train(config, backbone, concepts, mesh, stop)
    except OSError as error:
        raise unwritable(as_path(error.filename or config.output_dir), error) from error
    finished = set(outcome.finished)
    trained = tuple(
        read_trained_concept(root, spec.name, spec.base_class)
        for spec in concepts.concepts
        if spec.name in finished
    )
    return TrainResult(root, trained, outcome.failures, outcome.interrupted, backbone)


def _load(config: TrainConfig, mesh: Mesh) -> Backbone:
    """The frozen networks that the config names, on every device of ``mesh``."""
    dtype = {"auto": default_dtype(), "bf16": "bfloat16", "no": "float32"}[config.mixed_precision]
    devices = jax.local_devices()
    if jax.process_count() > 1:
        logger.info("process %d of %d", jax.process_index(), jax.process_count())
    logger.info("%d device(s) of kind %s, %s", len(devices), devices[0].device_kind, dtype)
    logger.info("loading %s", config.pretrained_model_name_or_path)
    return load_backbone(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        dtype=dtype,
        sharding=replicated(mesh),
    )


def _placed(config: TrainConfig, backbone: Backbone, mesh: Mesh) -> Backbone:
    """Networks that are loaded already, on every device of ``mesh``.

    Raises:
      CatVersionError: their numbers are not those that the config asks for.
    """
    given = _dtype_of(backbone)
    wanted = {"auto": given, "bf16": "bfloat16", "no": "float32"}[config.mixed_precision]
    if given != wanted:
        raise CatVersionError(
            f"mixed_precision={config.mixed_precision!r}: the backbone that was given holds "
            f"{given}. Load it with dtype={wanted!r}, or leave mixed_precision='auto'."
        )
    networks = {
        name: jax.device_put(getattr(backbone, name), replicated(mesh))
        for name in ("text_encoder", "unet", "vae")
    }
    return dataclasses.replace(backbone, **networks)


def _dtype_of(backbone: Backbone) -> str:
    return str(jax.tree.leaves(backbone.unet)[0].dtype)
