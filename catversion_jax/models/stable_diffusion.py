"""All frozen networks of one Stable Diffusion."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.config.sampling import DrawingDefaults
from catversion_jax.diffusion import NoiseScheduleConfig, drawing_defaults
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.components_fit import check_components_fit, inpainting_channels
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.text_encoders import (
    TextEncoderFacts,
    TextEncoderFiles,
    read_text_encoders,
    read_tokenizers,
)
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.unet.unet import UNet2DConditionModel
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.models.weights.content_digest import ContentDigest
from catversion_jax.models.weights.convert import convert_state_dict, stored_names
from catversion_jax.models.weights.fingerprint import encoder_hashes, fingerprints_by_name
from catversion_jax.models.weights.model_files import ModelFiles, open_model
from catversion_jax.models.weights.network import Network, abstract_network, named_dtype
from catversion_jax.runtime.bucket_paths import path_text
from catversion_jax.runtime.precision import use_full_float32
from catversion_jax.runtime.sharding import make_mesh, replicated

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The frozen parts. Not a pytree: hand ``.text_encoders``, ``.unet`` and ``.vae`` to jitted
    functions.

    ``text_encoder``, ``tokenizer`` and the facts about them are those of the only text encoder;
    they raise where the model has two.

    Attributes:
      text_encoders: one, or the two of Stable Diffusion XL; see
        :func:`~.text_encoders.text_states` and :class:`~.clip.text.CLIPTextModel`.
      unet: ``(sample [B h w 4], timesteps, encoder_hidden_states [B T D]) -> [B h w 4]``; in
        Stable Diffusion XL with :class:`~.unet.embeddings.AddedConditions`.
      vae: for :func:`~.vae.vae_encode` and :func:`~.vae.vae_decode`; its latents are
        unscaled. Always float32.
      tokenizers: prompts to token ids, one for each text encoder.
      text_facts: what a concept must fit, for each text encoder.
      noise_schedule: what ``scheduler_config.json`` says.
      name: the folder, file or hub id as the user gave it.
      folder: where it lies on this machine; of a single-file checkpoint, the file.
      latent_scale: the UNet sees latents multiplied by this.
      latent_downsampling: pixels per latent position, each way.
      latent_channels: of the latents.
      default_resolution: pixels per side the UNet was trained at.
      takes_guidance: the UNet was distilled with the guidance scale as an input (LCM).
      inpaints: the UNet reads a mask and the latents of what is kept too (``inpainting.py``).
      zeros_for_empty_prompt: an empty negative prompt means states of zeros, as in Stable
        Diffusion XL, and not the states of ``""``.
      digests: of the content of ``text_encoder``, ``unet``, ``vae``, ``scheduler`` and, if there is
        one, ``text_encoder_2``, by these names (``content_digest.py``); empty where no weights were
        read.
    """

    text_encoders: tuple[Network, ...]
    unet: Network
    vae: Network
    tokenizers: tuple[Tokenizer, ...]
    text_facts: tuple[TextEncoderFacts, ...]
    noise_schedule: NoiseScheduleConfig
    name: str
    folder: Path
    latent_scale: float
    latent_downsampling: int
    latent_channels: int
    default_resolution: int
    takes_guidance: bool
    inpaints: bool
    zeros_for_empty_prompt: bool
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def drawing_defaults(self) -> DrawingDefaults:
        """Sampler, steps and guidance where nobody gives them."""
        return drawing_defaults(self.noise_schedule, takes_guidance=self.takes_guidance)

    @property
    def text_encoder(self) -> Network:
        """The only text encoder: ``(token_ids [B T], learned=None) -> [B T D]``."""
        return self._only(self.text_encoders)

    @property
    def tokenizer(self) -> Tokenizer:
        """The only text encoder's tokenizer."""
        return self._only(self.tokenizers)

    @property
    def text_encoder_sha256(self) -> str:
        """The only text encoder's fingerprint; see ``fingerprint.py``."""
        return self._only(self.text_facts).sha256

    @property
    def dtype(self) -> str:
        """``"float32"`` or ``"bfloat16"``: the numbers of the UNet."""
        return str(jax.tree.leaves(self.unet)[0].dtype)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the text encoders, under the names that they have in files."""
        return fingerprints_by_name([facts.sha256 for facts in self.text_facts])

    @property
    def reads_time_ids(self) -> bool:
        """Whether the UNet takes :class:`~.unet.embeddings.AddedConditions`, as Stable Diffusion
        XL's does.
        """
        return len(self.text_encoders) > 1

    @property
    def context_length(self) -> int:
        """Tokens of a prompt, the same for all text encoders."""
        return self.tokenizers[0].model_max_length

    @property
    def num_text_layers(self) -> int:
        """Layers of the only text encoder that feed the UNet."""
        return self._only(self.text_facts).num_context_layers

    @property
    def num_heads(self) -> int:
        """Attention heads of the only text encoder."""
        return self._only(self.text_facts).num_heads

    @property
    def head_dim(self) -> int:
        """Width of one head of the only text encoder."""
        return self._only(self.text_facts).head_dim

    def _only(self, parts: tuple[T, ...]) -> T:
        """The one part.

        Raises:
          CatVersionError: there are two, and half of a prompt would be forgotten.
        """
        if len(parts) > 1:
            raise CatVersionError(
                f"{self.name}: has {len(parts)} text encoders (Stable Diffusion XL), and this "
                "works with one only: half of the prompt would stay plain. Use a Stable Diffusion "
                "1.x or 2.x model."
            )
        return parts[0]


def load_backbone(
    model: str | Path | ModelFiles,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    sharding: Any = None,
) -> Backbone:
    """Load a Stable Diffusion 1.x, 2.x or XL.

    Args:
      model: a diffusers folder, a Hugging Face hub id, or a ``.safetensors`` file in the layout of
        the original code; or any of these already opened, and then the next three say nothing.
      revision: branch, tag or commit of the hub id.
      variant: for instance ``"fp16"``: read ``*.fp16.safetensors``, and the plain files of a
        component that has only those.
      prediction_type: ``"epsilon"`` or ``"v_prediction"``, for a single file that does not say it.
      dtype: ``"float32"`` or ``"bfloat16"`` for text encoders and UNet. With float32, products of
        float32 matrices keep all their bits on accelerators too, in the whole process.
      sharding: where the weights go, as for ``jax.device_put``.

    Raises:
      CatVersionError: the folder or file, a configuration or the weights cannot be used; the
        message says which and why.
    """
    if isinstance(model, str | Path) or not hasattr(model, "text_encoders"):  # not opened yet
        files = open_model(
            path_text(model), revision=revision, variant=variant, prediction_type=prediction_type
        )
        name = str(model)
    else:
        files = model
        name = str(files.path)
    digests = dict[str, str]()
    load = functools.partial(_load_component, files, sharding=sharding, digests=digests)
    backbone = _assemble(name, files, named_dtype(dtype), load)
    digests["scheduler"] = ContentDigest().hexdigest(files.scheduler_config())
    facts = tuple(
        dataclasses.replace(fact, hashes=encoder_hashes(files.tensors(component)))
        for component, fact in zip(files.text_encoders, backbone.text_facts, strict=True)
    )
    defaults = backbone.drawing_defaults
    if defaults.because:
        logger.info(
            "%s: taken for a distilled model (%s); unless told otherwise it is drawn with %s, %d "
            "steps and guidance %g",
            name,
            defaults.because,
            defaults.sampler,
            defaults.num_inference_steps,
            defaults.guidance_scale,
        )
    return dataclasses.replace(backbone, text_facts=facts, digests=digests)


def load_model(
    model: str | Path | Backbone,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: str | None = None,
    max_devices: int | None = None,
) -> Backbone:
    """Load a model for drawing: a copy on every device of this machine.

    Args:
      model: as for :func:`load_backbone`; a backbone is returned as it is.
      revision: branch, tag or commit of the hub id.
      variant: variant of the weight files.
      prediction_type: of a single file that does not say it.
      dtype: of text encoder and UNet; None is :func:`default_dtype`.
      max_devices: so many devices at most receive a copy.

    Raises:
      CatVersionError: the model cannot be used; see :func:`load_backbone`.
    """
    if isinstance(model, Backbone):
        return model
    return load_backbone(
        model,
        revision=revision,
        variant=variant,
        prediction_type=prediction_type,
        dtype=dtype or default_dtype(),
        sharding=replicated(make_mesh(1, jax.local_devices()[:max_devices])),
    )


def abstract_backbone(
    model: str | Path,
    *,
    revision: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
) -> Backbone:
    """The same without weights: leaves are ``jax.ShapeDtypeStruct``. Reads, or downloads, nothing
    but configurations and the tokenizer.

    Raises:
      CatVersionError: the folder or file, or a configuration, cannot be used.
    """
    files = open_model(model, revision=revision, prediction_type=prediction_type, weights=False)

    def shapes(name: str, module_fn: Callable[..., nnx.Module], weights: Any) -> Network:
        del name, weights
        return abstract_network(module_fn)

    return _assemble(str(model), files, named_dtype(dtype), shapes)


def check_weights(files: ModelFiles) -> None:
    """Make sure that weights fit the configurations beside them, from the files' headers alone.

    Raises:
      CatVersionError: as :func:`load_backbone`.
    """

    def checked(name: str, module_fn: Callable[..., nnx.Module], weights: Any) -> Network:
        del weights
        network = abstract_network(module_fn)
        stored_names(files.tensors(name), network, source=files.source(name))
        return network

    _assemble(str(files.path), files, jnp.bfloat16, checked)


def _assemble(name: str, files: ModelFiles, weights: Any, load: Callable[..., Network]) -> Backbone:
    if weights == jnp.float32:
        use_full_float32()
    encoders = read_text_encoders(files)
    unet_config = _parsed(UNetConfig.from_hf, files, "unet")
    vae_config = _parsed(VAEConfig.from_hf, files, "vae")
    check_components_fit(files.path, [one.config for one in encoders], unet_config, vae_config)
    noise_schedule = NoiseScheduleConfig.from_scheduler_config(files.scheduler_config())
    tokenizers = read_tokenizers(files, encoders)

    return Backbone(
        text_encoders=tuple(
            load(one.name, functools.partial(TextEncoderFiles.module, one, weights), weights)
            for one in encoders
        ),
        unet=load("unet", functools.partial(_unet, unet_config, weights), weights),
        vae=load("vae", functools.partial(_vae, vae_config), jnp.float32),
        tokenizers=tokenizers,
        text_facts=tuple(one.facts(of_two=len(encoders) > 1) for one in encoders),
        noise_schedule=noise_schedule,
        name=name,
        folder=files.path,
        latent_scale=vae_config.scaling_factor,
        latent_downsampling=vae_config.downsampling,
        latent_channels=vae_config.latent_channels,
        default_resolution=unet_config.sample_size * vae_config.downsampling,
        takes_guidance=unet_config.guidance_width is not None,
        inpaints=unet_config.in_channels == inpainting_channels(vae_config.latent_channels),
        zeros_for_empty_prompt=files.zeros_for_empty_prompt,
    )


def _unet(config: UNetConfig, weights: Any, rngs: nnx.Rngs) -> UNet2DConditionModel:
    return UNet2DConditionModel(config, layers=LayerFactory(rngs, weights))


def _vae(config: VAEConfig, rngs: nnx.Rngs) -> AutoencoderKL:
    return AutoencoderKL(config, layers=LayerFactory(rngs))


def _parsed(from_hf: Callable[..., T], files: ModelFiles, component: str) -> T:
    """The ``config.json`` of one component."""
    return from_hf(files.config(component), source=files.config_source(component))


def model_resolution(files: ModelFiles) -> int:
    """Pixels per side that a model was trained on; only configurations are read.

    Raises:
      CatVersionError: the configuration of the UNet or the autoencoder cannot be used.
    """
    unet_config = _parsed(UNetConfig.from_hf, files, "unet")
    return unet_config.sample_size * _parsed(VAEConfig.from_hf, files, "vae").downsampling


def _load_component(
    files: ModelFiles,
    name: str,
    module_fn: Callable[..., nnx.Module],
    dtype: Any,
    *,
    sharding: Any,
    digests: dict[str, str],
) -> Network:
    """Read one component; its digest goes into ``digests``."""
    content = ContentDigest()
    network = convert_state_dict(
        files.tensors(name),
        abstract_network(module_fn),
        dtype=dtype,
        sharding=sharding,
        source=files.source(name),
        on_weight=content.add,
    )
    digests[name] = content.hexdigest(files.config(name))
    return network


def default_dtype() -> str:
    """``float32`` on CPUs, where bfloat16 is emulated and slow; ``bfloat16`` on accelerators."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
