"""The files of a model by component, whatever form they come in: a diffusers folder, or one
single-file checkpoint.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from catversion_jax.assets import embedded_folder
from catversion_jax.errors import CatVersionError, listed, shown
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.clip.vocabulary import says_pad_token, trained_pad_token
from catversion_jax.models.weights.folder_copies import copy_components
from catversion_jax.models.weights.hf_config import read_config
from catversion_jax.models.weights.hub import locate_model
from catversion_jax.models.weights.model_index import (
    exported_concepts,
    zeros_for_empty_prompt,
)
from catversion_jax.models.weights.safetensors_files import StoredTensor, open_checkpoint
from catversion_jax.models.weights.single_file import SingleFile
from catversion_jax.models.weights.variants import (
    TEXT_ENCODERS,
    TOKENIZERS,
    component_variants,
    components_of,
)
from catversion_jax.runtime.bucket_paths import home_expanded

logger = logging.getLogger(__name__)


class ModelFiles(Protocol):
    """What a model consists of."""

    @property
    def path(self) -> Path:
        """Where it lies on this machine."""

    def source(self, component: str) -> str:
        """What messages call a component's weights."""

    def config_source(self, component: str) -> str:
        """What messages call a component's configuration."""

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that are text encoders: one, or the two of Stable Diffusion XL."""

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """Whether an empty negative prompt means states of zeros."""

    def config(self, component: str) -> dict[str, Any]:
        """A component's ``config.json``."""

    def tensors(self, component: str) -> Mapping[str, StoredTensor]:
        """A component's weights by PyTorch name; values are read when asked for."""

    def scheduler_config(self) -> dict[str, Any]:
        """``scheduler_config.json``."""

    def tokenizer(
        self,
        component: str = "text_encoder",
        *,
        context: int | None = None,
        vocab_size: int | None = None,
    ) -> Tokenizer:
        """The tokenizer of a text encoder, of which the positions and embeddings are given where
        they are known.
        """

    def save_to(self, folder: Path) -> dict[str, Any]:
        """Write every component to a new ``folder`` in the form of a diffusers folder.

        Returns:
          What belongs into its ``model_index.json``.
        """


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A diffusers folder.

    Attributes:
      path: the folder.
      variants: of the weight files, by component; none where no weights are read.
    """

    path: Path
    variants: Mapping[str, str | None] = dataclasses.field(default_factory=dict)

    def source(self, component: str) -> str:
        """The component's folder."""
        return str(self.path / component)

    def config_source(self, component: str) -> str:
        """The component's ``config.json``."""
        return str(self.path / component / "config.json")

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """``text_encoder``, and the other one where ``model_index.json`` names it."""
        there = components_of(self.path)
        return tuple(name for name in TEXT_ENCODERS if name in there)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """What ``model_index.json`` says; nobody but Stable Diffusion XL does so."""
        return len(self.text_encoders) > 1 and zeros_for_empty_prompt(self.path)

    def config(self, component: str) -> dict[str, Any]:
        """The content of the component's ``config.json``."""
        return read_config(self.path / component)

    def tensors(self, component: str) -> Mapping[str, StoredTensor]:
        """The tensors of the component's safetensors."""
        return open_checkpoint(self.path / component, variant=self.variants[component])

    def scheduler_config(self) -> dict[str, Any]:
        """The content of ``scheduler/scheduler_config.json``."""
        return read_config(self.path / "scheduler", "scheduler_config.json")

    def tokenizer(
        self,
        component: str = "text_encoder",
        *,
        context: int | None = None,
        vocab_size: int | None = None,
    ) -> Tokenizer:
        """The tokenizer of the folder ``tokenizer``, or ``tokenizer_2`` of the second encoder."""
        folder = self.path / TOKENIZERS[component]
        said = says_pad_token(folder)
        return Tokenizer.from_folder(
            folder,
            context=context,
            vocab_size=vocab_size,
            pad_token=None if said else trained_pad_token(self.config(component)),
        )

    def save_to(self, folder: Path) -> dict[str, Any]:
        """Copy every component; see :func:`~.folder_copies.copy_components`."""
        return copy_components(self.path, folder)


def opened(model: str | Path | ModelFiles, *, prediction_type: str | None = None) -> ModelFiles:
    """The files of a model on this machine; one already opened is returned as it is.

    Args:
      model: a diffusers folder or a single file.
      prediction_type: what the UNet predicts, where a single file does not say it.

    Raises:
      CatVersionError: a single file that cannot be used.
    """
    if not isinstance(model, str | Path):
        return model
    path = home_expanded(model)
    if path.is_file():
        return SingleFile(path, prediction_type=prediction_type)
    return ModelFolder(path)


def open_model(
    model: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    weights: bool = True,
) -> ModelFiles:
    """The files of a Stable Diffusion 1.x, 2.x or XL.

    Args:
      model: a diffusers folder, a Hugging Face hub id, a ``.safetensors`` file in the original
        layout, or ``tiny-sd``.
      revision: branch, tag or commit of the hub id.
      variant: variant of a folder's weight files, for instance ``"fp16"``.
      prediction_type: what the UNet predicts, where a single file does not say it.
      weights: whether weights are wanted; without them nothing but configurations is downloaded.

    Raises:
      CatVersionError: it is none of these, or cannot be used; the message says why.
    """
    if embedded_folder(model) is None and home_expanded(model).is_file():
        return _open_file(home_expanded(model), revision, variant, prediction_type)
    folder = locate_model(model, revision=revision, variant=variant, weights=weights)
    files = ModelFolder(folder, component_variants(folder, variant) if weights else {})
    if inside := exported_concepts(folder):
        logger.warning(
            "%s: is an exported pipeline, of which only the plain model is used here. Its concepts "
            "act when they are given as such: %s",
            folder,
            ", ".join(listed([str(path) for path in inside])),
        )
    if prediction_type is not None:
        stated = files.scheduler_config().get("prediction_type", "epsilon")
        if stated != prediction_type:
            raise CatVersionError(
                f"prediction_type={prediction_type}: {folder / 'scheduler'} says {shown(stated)}, "
                "and a folder knows. Leave prediction_type out, or correct scheduler_config.json."
            )
    return files


def _open_file(
    path: Path, revision: str | None, variant: str | None, prediction_type: str | None
) -> SingleFile:
    for name, value in (("revision", revision), ("variant", variant)):
        if value is not None:
            raise CatVersionError(
                f"{name}={value}: {path} is a single file, which has none. Leave {name} out."
            )
    return SingleFile(path, prediction_type=prediction_type)
