"""All frozen networks of one Stable Diffusion."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from catversion_jax.config.sampling import DrawingDefaults
from catversion_jax.diffusion import NoiseScheduleConfig, drawing_defaults
from catversion_jax.errors import CatVersionError
from catversion_jax.models.clip.text import CLIPTextConfig, CLIPTextModel
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.clip.vision import sub_config
from catversion_jax.models.layers.resnet import LayerFactory
from catversion_jax.models.unet.config import UNetConfig
from catversion_jax.models.unet.unet import UNet2DConditionModel
from catversion_jax.models.vae import AutoencoderKL, VAEConfig
from catversion_jax.models.weights.content_digest import ContentDigest
from catversion_jax.models.weights.convert import convert_state_dict, load_network
from catversion_jax.models.weights.fingerprint import text_encoder_sha256
from catversion_jax.models.weights.hf_config import read_config
from catversion_jax.models.weights.model_files import ModelFiles, open_model
from catversion_jax.models.weights.network import Network, abstract_network
from catversion_jax.runtime.bucket_paths import home_expanded
from catversion_jax.runtime.precision import use_full_float32
from catversion_jax.runtime.sharding import make_mesh, replicated

T = TypeVar("T")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The frozen parts. Not a pytree: hand ``.text_encoder``, ``.unet`` and ``.vae`` to jitted
    functions.

    Attributes:
      text_encoder: ``(token_ids [B T], learned=None) -> [B T D]``; see
        :class:`~.clip.text.CLIPTextModel`.
      unet: ``(sample [B h w 4], timesteps, encoder_hidden_states [B T D]) -> [B h w 4]``.
      vae: for :func:`~.vae.vae_encode` and :func:`~.vae.vae_decode`; its latents are
        unscaled. Always float32.
      tokenizer: prompts to token ids.
      noise_schedule: what ``scheduler_config.json`` says.
      name: the folder, file or hub id as the user gave it.
      folder: where it lies on this machine; of a single-file checkpoint, the file.
      text_encoder_sha256: see ``fingerprint.py``.
      num_text_layers: layers of the text encoder that feed the UNet.
      num_heads: attention heads of the text encoder.
      head_dim: width of one head.
      latent_scale: the UNet sees latents multiplied by this.
      latent_downsampling: pixels per latent position, each way.
      latent_channels: of the latents.
      default_resolution: pixels per side the UNet was trained at.
      digests: of the content of ``text_encoder``, ``unet``, ``vae`` and ``scheduler``, by these
        names (``content_digest.py``); empty where no weights were read.
    """

    text_encoder: Network
    unet: Network
    vae: Network
    tokenizer: Tokenizer
    noise_schedule: NoiseScheduleConfig
    name: str
    folder: Path
    text_encoder_sha256: str
    num_text_layers: int
    num_heads: int
    head_dim: int
    latent_scale: float
    latent_downsampling: int
    latent_channels: int
    default_resolution: int
    digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def drawing_defaults(self) -> DrawingDefaults:
        """Sampler, steps and guidance where nobody gives them."""
        return drawing_defaults(self.noise_schedule)


def load_backbone(
    model: str | Path | ModelFiles,
    *,
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    dtype: str = "float32",
    sharding: Any = None,
) -> Backbone:
    """Load a Stable Diffusion 1.x or 2.x.

    Args:
      model: a diffusers folder, a Hugging Face hub id, or a ``.safetensors`` file in the layout of
        the original code; or any of these already opened, and then the next three say nothing.
      revision: branch, tag or commit of the hub id.
      variant: for instance ``"fp16"``: read ``*.fp16.safetensors``, and the plain files of a
        component that has only those.
      prediction_type: ``"epsilon"`` or ``"v_prediction"``, for a single file that does not say it.
      dtype: ``"float32"`` or ``"bfloat16"`` for text encoder and UNet. With float32, products of
        float32 matrices keep all their bits on accelerators too, in the whole process.
      sharding: where the weights go, as for ``jax.device_put``.

    Raises:
      CatVersionError: the folder or file, a configuration or the weights cannot be used; the
        message says which and why.
    """
    files = model
    if isinstance(files, str | Path):
        files = open_model(
            files, revision=revision, variant=variant, prediction_type=prediction_type
        )
    name = str(model) if isinstance(model, str | Path) else str(files.path)
    digests = dict[str, str]()
    load = functools.partial(_load_component, files, sharding=sharding, digests=digests)
    backbone = _assemble(name, files, _dtype(dtype), load)
    digests["scheduler"] = ContentDigest().hexdigest(files.scheduler_config())
    return dataclasses.replace(
        backbone,
        text_encoder_sha256=text_encoder_sha256(files.tensors("text_encoder")),
        digests=digests,
    )


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

    def shapes(name: str, module_fn: Callable[[nnx.Rngs], nnx.Module], weights: Any) -> Network:
        del name, weights
        return abstract_network(module_fn)

    return _assemble(str(model), files, _dtype(dtype), shapes)


def _assemble(name: str, files: ModelFiles, weights: Any, load: Callable[..., Network]) -> Backbone:
    if weights == jnp.float32:
        use_full_float32()
    text_config = _parsed(CLIPTextConfig.from_hf, files, "text_encoder")
    unet_config = _parsed(UNetConfig.from_hf, files, "unet")
    vae_config = _parsed(VAEConfig.from_hf, files, "vae")
    _check_components_fit(files.path, text_config, unet_config, vae_config)
    noise_schedule = NoiseScheduleConfig.from_scheduler_config(files.scheduler_config())
    tokenizer = files.tokenizer(
        context=text_config.max_position_embeddings, vocab_size=text_config.vocab_size
    )

    def text_encoder(rngs: nnx.Rngs) -> CLIPTextModel:
        return CLIPTextModel(text_config, dtype=weights, param_dtype=weights, rngs=rngs)

    def unet(rngs: nnx.Rngs) -> UNet2DConditionModel:
        return UNet2DConditionModel(unet_config, layers=LayerFactory(rngs, weights))

    def vae(rngs: nnx.Rngs) -> AutoencoderKL:
        return AutoencoderKL(vae_config, layers=LayerFactory(rngs))

    return Backbone(
        text_encoder=load("text_encoder", text_encoder, weights),
        unet=load("unet", unet, weights),
        vae=load("vae", vae, jnp.float32),
        tokenizer=tokenizer,
        noise_schedule=noise_schedule,
        name=name,
        folder=files.path,
        text_encoder_sha256="",
        num_text_layers=text_config.num_hidden_layers,
        num_heads=text_config.num_attention_heads,
        head_dim=text_config.hidden_size // text_config.num_attention_heads,
        latent_scale=vae_config.scaling_factor,
        latent_downsampling=vae_config.downsampling,
        latent_channels=vae_config.latent_channels,
        default_resolution=unet_config.sample_size * vae_config.downsampling,
    )


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
    module_fn: Callable[[nnx.Rngs], nnx.Module],
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


def load_text_encoder(folder: str | Path, dtype: str = "float32") -> Network:
    """Load the text encoder alone, from a transformers folder (``config.json`` and safetensors).

    Returns:
      A callable ``(token_ids [B T], learned=None) -> [B T D]``; the final layer norm is applied.

    Raises:
      CatVersionError: the folder is not a CLIP's, or its weights do not fit.
    """
    folder = home_expanded(folder)
    if (folder / "model_index.json").is_file():
        raise CatVersionError(
            f"{folder}: is a whole diffusers folder. Give {folder / 'text_encoder'} instead, or "
            "use load_backbone."
        )
    config = read_config(folder)
    ignore: tuple[str, ...] = ()
    if config.get("architectures") == ["CLIPTextModelWithProjection"]:
        ignore = (r"^text_projection\.",)
    if config.get("model_type") == "clip":
        source = str(folder / "config.json")
        config = dict(sub_config(config, "text_config", source=source))
        ignore = (r"^vision_model\.", r"^(visual|text)_projection\.", r"^logit_scale$")
    weights = _dtype(dtype)
    text_config = CLIPTextConfig.from_hf(config, source=str(folder / "config.json"))
    return load_network(
        lambda rngs: CLIPTextModel(text_config, dtype=weights, param_dtype=weights, rngs=rngs),
        folder,
        dtype=weights,
        ignore=ignore,
    )


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise CatVersionError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _check_components_fit(
    folder: Path, text: CLIPTextConfig, unet: UNetConfig, vae: VAEConfig
) -> None:
    """Make sure that text encoder, UNet and autoencoder are of the same widths.

    Raises:
      CatVersionError: the widths differ.
    """
    contexts = sorted(set(unet.cross_attention_dim))
    if contexts != [text.hidden_size]:
        raise CatVersionError(
            f"{folder}: unet cross_attention_dim = {' and '.join(map(str, contexts))} but "
            f"text_encoder hidden_size = {text.hidden_size}; they must be equal. The components "
            "are of different models: download the model again."
        )
    if (vae.in_channels, vae.out_channels) != (3, 3):
        raise CatVersionError(
            f"{folder}: vae in_channels = {vae.in_channels} and out_channels = {vae.out_channels}, "
            "must both be 3 (red, green, blue). Use a Stable Diffusion 1.x or 2.x model."
        )
    if not unet.in_channels == unet.out_channels == vae.latent_channels:
        raise CatVersionError(
            f"{folder}: unet in_channels = {unet.in_channels}, out_channels = "
            f"{unet.out_channels} and vae latent_channels = {vae.latent_channels} must be equal. "
            "Inpainting, depth and upscaling models are not supported: use the text-to-image model "
            "of the same family."
        )
