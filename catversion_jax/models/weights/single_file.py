"""A Stable Diffusion that is one ``.safetensors`` file in the layout of the original code, as a
model site gives it. Nothing but its header is read until a weight is asked for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from catversion_jax.errors import CatVersionError, listed
from catversion_jax.models.clip.tokenizer import Tokenizer
from catversion_jax.models.clip.vocabulary import clip_tokenizer
from catversion_jax.models.weights.diffusers_folder import write_diffusers_folder
from catversion_jax.models.weights.families import FAMILIES, Family
from catversion_jax.models.weights.ldm import UNET_PREFIX, VAE_PREFIX, diffusers_tensors
from catversion_jax.models.weights.safetensors_files import (
    MOST_LISTED,
    PICKLED,
    StoredTensor,
    read_header_and_metadata,
)

_PREDICTIONS = ("epsilon", "v_prediction")
_MODELSPEC = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction"}
_MODELSPEC |= {"v_prediction": "v_prediction", "v-prediction": "v_prediction"}

_WHOLE = "Give a whole Stable Diffusion"
_OTHER_KINDS: tuple[tuple[str, str], ...] = (
    (
        r"(^|[._])lora[._]|\.(hada_w\d|lokr_w\d|oft_blocks|dora_scale)",
        "is a LoRA, which changes a model and is none. Give the model that it was made for",
    ),
    (
        r"^(emb_params|string_to_param|clip_[lg]|<[^>]*>)$",
        "is a textual-inversion embedding: a few vectors, no model. Give the model that it was "
        "made for",
    ),
    (
        r"^text_encoder(_2)?\.layers\.\d+\.(key|value)$",
        "is a concept of catversion, no model. Give the model that it was trained on",
    ),
    (r"^control_model\.", f"is a ControlNet. {_WHOLE}"),
    (r"double_blocks\.|double_stream_", f"is a FLUX, whose text comes from T5. {_WHOLE}"),
    (r"joint_blocks\.", f"is a Stable Diffusion 3, which is no U-Net. {_WHOLE} 1.x or 2.x"),
    (
        r"^(model\.diffusion_model\.)?(clip_txt_(pooled_)?mapper|effnet_mapper)\.|\.channelwise\.",
        f"is a Stable Cascade, which draws in a space of its own without a VAE. {_WHOLE}",
    ),
    (
        r"^(model\.diffusion_model\.)?encoder_hid_proj\.",
        f"is a Kolors, whose text comes from ChatGLM. {_WHOLE}",
    ),
    (
        r"(^|\.)(adaLN_modulation|adaln_single|[tx]_embedder|patchify_proj|caption_projection|"
        r"cap_embedder|scale_shift_table|single_transformer_blocks|mlp_t5)(\.|$)",
        "is a diffusion transformer (PixArt, AuraFlow, Sana and their like), which is no U-Net and "
        f"does not read CLIP. {_WHOLE}",
    ),
    (
        r"^conditioner\.embedders\.0\.model\.",
        "is the refiner of Stable Diffusion XL, which only finishes images. Give a base model",
    ),
    (
        r"^(down_blocks|up_blocks|mid_block)\.",
        "is the UNet out of a diffusers folder. Give the folder that holds model_index.json",
    ),
    (
        r"^(text_model\.)?encoder\.layers\.",
        "is the text encoder out of a diffusers folder. Give the folder that holds "
        "model_index.json",
    ),
    (
        r"^(encoder|decoder)\.",
        f"is an autoencoder (VAE) alone: no UNet, no text encoder. {_WHOLE}",
    ),
    (
        r"\.(absmax|nested_absmax|quant_map|quant_state\.|weight_scale|scale_weight)|^scaled_fp8$",
        "is quantized. Give the model's file in float32, fp16 or bf16",
    ),
)
"""A name that only another kind of file has, and the rest of the sentence about that file."""


class SingleFile:
    """The components of one file, by today's names.

    Attributes:
      path: the file.
      family: what it is.
    """

    def __init__(
        self, path: Path, *, prediction_type: str | None = None, family: Family | None = None
    ):
        """Read the header.

        Args:
          path: a ``.safetensors`` file.
          prediction_type: ``"epsilon"`` or ``"v_prediction"``, over what the file says.
          family: what the file is; None recognises it.

        Raises:
          CatVersionError: another kind of file, which the message names; tensors that have no place
            in the family, all of them listed.
        """
        _check_format(path)
        stored, metadata = read_header_and_metadata(path)
        self.path = path
        self.family = family = family or family_of(path, stored)
        self._components, leftover = diffusers_tensors(stored, family)
        if leftover:
            names = [f"{name:.200}" for name in leftover]
            raise CatVersionError(
                f"{path}: {len(leftover)} of its tensors have no place in a {family.name}:\n  "
                + "\n  ".join(listed(names, MOST_LISTED))
                + "\nUse a checkpoint of the original architecture."
            )
        self._zero_snr = "ztsnr" in stored
        self._predicts_v = self._zero_snr or "v_pred" in stored
        self._stated = metadata.get("modelspec.prediction_type")
        self._given = prediction_type

    def source(self, component: str) -> str:
        """What messages call a component's weights."""
        return f"{self.path} ({component} of a {self.family.name})"

    def config_source(self, component: str) -> str:
        """What messages call a component's configuration."""
        return self.source(component)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """The components that are text encoders."""
        return tuple(self.family.text_encoders)

    @property
    def zeros_for_empty_prompt(self) -> bool:
        """As in the published folder of Stable Diffusion XL."""
        return len(self.text_encoders) > 1

    @functools.cached_property
    def prediction_type(self) -> str:
        """What the UNet predicts: as the user says, else the file, else the family.

        Raises:
          CatVersionError: nobody says it, or it is another one.
        """
        choice = self._given
        if choice is None and self._stated is not None:
            choice = _MODELSPEC.get(self._stated.strip().lower(), self._stated)
        if choice is None:
            choice = "v_prediction" if self._predicts_v else self.family.prediction_type
        if choice is None:
            raise CatVersionError(
                f"{self.path}: a {self.family.name} predicts the noise (the 512-pixel base models) "
                "or v (the 768-pixel ones), and this file does not say which. Give "
                "prediction_type=epsilon or prediction_type=v_prediction; a wrong one draws noise."
            )
        if choice not in _PREDICTIONS:
            raise CatVersionError(
                f"{self.path}: prediction_type = {choice:.60}, must be one of "
                f"{', '.join(_PREDICTIONS)}. Give prediction_type= with one of them."
            )
        return choice

    def config(self, component: str) -> dict[str, Any]:
        """The family's ``config.json``; the channels of a UNet's input are those of the file.

        Raises:
          CatVersionError: of the UNet, where :attr:`prediction_type` decides its resolution.
        """
        config = dict(self.family.configs[component])
        if component != "unet":
            return config
        first = self._components["unet"].get("conv_in.weight")
        if first is not None and len(first.shape) == 4:
            config["in_channels"] = first.shape[1]
        smaller = self.family.epsilon_sample_size
        if smaller is not None and self.prediction_type == "epsilon":
            config["sample_size"] = smaller
        return config

    def tensors(self, component: str) -> Mapping[str, StoredTensor]:
        """The weights of a component, by today's names."""
        return self._components[component]

    def scheduler_config(self) -> dict[str, Any]:
        """The family's ``scheduler_config.json`` with the file's prediction type.

        Raises:
          CatVersionError: see :attr:`prediction_type`.
        """
        config = dict(self.family.scheduler) | {"prediction_type": self.prediction_type}
        return config | ({"rescale_betas_zero_snr": True} if self._zero_snr else {})

    def tokenizer(
        self,
        component: str = "text_encoder",
        *,
        context: int | None = None,
        vocab_size: int | None = None,
    ) -> Tokenizer:
        """CLIP's, as the text encoder ``component`` was trained with it."""
        config = self.family.configs[component]
        return clip_tokenizer(
            pad_token=self.family.text_encoders[component].pad_token,
            context=context or config["max_position_embeddings"],
            vocab_size=vocab_size or config["vocab_size"],
        )

    def save_to(self, folder: Path) -> dict[str, Any]:
        """Write the model as a diffusers folder; see :func:`~.write_diffusers_folder`.

        Raises:
          CatVersionError: see :attr:`prediction_type`; or a file cannot be written.
        """
        configs = {component: self.config(component) for component in self.family.configs}
        return write_diffusers_folder(
            folder, self.family, configs, self.scheduler_config(), self._components
        )


def family_of(path: Path, names: Collection[str]) -> Family:
    """Which family a file with tensors of these ``names`` belongs to.

    Raises:
      CatVersionError: none, or not the whole of one.
    """

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    for pattern, what in _OTHER_KINDS:
        if any(re.search(pattern, name) for name in names):
            raise CatVersionError(f"{path}: {what}.")
    if has("model_ema.") and not has(UNET_PREFIX):
        raise CatVersionError(
            f"{path}: holds the UNet only as a running mean (model_ema.*), with names without "
            "dots. Give the file that also has model.diffusion_model.*, often called 'pruned'."
        )
    fitting = [f for f in FAMILIES if all(has(p.prefix) for p in f.text_encoders.values())]
    lacking = [] if fitting else ["text encoder (cond_stage_model.* or conditioner.*)"]
    lacking += [] if has(UNET_PREFIX) else [f"UNet ({UNET_PREFIX}*)"]
    lacking += [] if has(VAE_PREFIX) else [f"autoencoder ({VAE_PREFIX}*)"]
    if len(lacking) == 3:
        examples = ", ".join(f"{name:.60}" for name in sorted(names)[:3])
        raise CatVersionError(
            f"{path}: is no Stable Diffusion checkpoint; its {len(names)} tensors have names such "
            f"as {examples or '(none)'}. {_WHOLE} in one file, or a diffusers folder."
        )
    if lacking:
        raise CatVersionError(
            f"{path}: has no {' and no '.join(lacking)}. {_WHOLE}; model sites call such a file "
            "'full' or 'with baked VAE'."
        )
    return fitting[0]


def _check_format(path: Path) -> None:
    """Refuse files of other formats.

    Raises:
      CatVersionError: it is one.
    """
    if not path.is_file():
        raise CatVersionError(f"{path}: is not a regular file. Give a .safetensors file.")
    with path.open("rb") as file:
        start = file.read(4)
    zipped = start.startswith((b"PK", b"\x80\x02"))  # torch.save since 1.6, and before
    if zipped or path.suffix.lower() in PICKLED:
        raise CatVersionError(
            f"{path}: is a pickled checkpoint, which can run arbitrary code and is not read. Take "
            "the model's .safetensors file, which model sites have beside it; or, if you trust it, "
            "convert it once in PyTorch: "
            "diffusers.StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)."
        )
    if start == b"GGUF":
        raise CatVersionError(
            f"{path}: is a quantized GGUF file. Use the model's .safetensors file."
        )
