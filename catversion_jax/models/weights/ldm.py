"""The names of single-file checkpoints (CompVis ``ldm``, Stability's ``sgm``) as today's diffusers
names: one table of prefixes per component, made from its configuration.

    | component      | in the file                               | here                          |
    |----------------|-------------------------------------------|-------------------------------|
    | unet           | ``model.diffusion_model.input_blocks.N.`` | ``down_blocks.B.resnets.L.``  |
    | vae            | ``first_stage_model.decoder.up.B.``       | ``decoder.up_blocks.3-B.``    |
    | text, CLIP     | ``....transformer.text_model.``           | the same without prefix       |
    | text, OpenCLIP | ``....model.transformer.resblocks.N.``    | ``encoder.layers.N.``         |

The longest prefix of a name that a table has decides. Values are those of the file, with three
exceptions: open_clip keeps queries, keys and values in one matrix ``in_proj``, whose rows are cut
in three, and its ``text_projection`` ``[in out]`` is transposed; the autoencoder's attention is
made of convolutions ``[out in 1 1]``, matrices today. Source: the modules' own attribute names in
CompVis/latent-diffusion ``openaimodel.py`` and ``model.py``, and open_clip ``model.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from catversion_jax.models.weights.families import Config, Family
from catversion_jax.models.weights.safetensors_files import StoredTensor

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."

Table = dict[str, str]
"""Prefix in the file -> prefix here."""

_UNET_ENDS: Table = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "label_emb.0.0.": "add_embedding.linear_1.",
    "label_emb.0.2.": "add_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
_UNET_RESNET: Table = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
_VAE_ENDS: Table = {
    "quant_conv.": "quant_conv.",
    "post_quant_conv.": "post_quant_conv.",
    **{
        f"{half}.{there}.": f"{half}.{here}."
        for half in ("encoder", "decoder")
        for there, here in (
            ("conv_in", "conv_in"),
            ("conv_out", "conv_out"),
            ("norm_out", "conv_norm_out"),
        )
    },
}
_VAE_RESNET: Table = {
    "norm1.": "norm1.",
    "conv1.": "conv1.",
    "norm2.": "norm2.",
    "conv2.": "conv2.",
    "nin_shortcut.": "conv_shortcut.",
}
_VAE_ATTENTION: Table = {
    "norm.": "group_norm.",
    "q.": "to_q.",
    "k.": "to_k.",
    "v.": "to_v.",
    "proj_out.": "to_out.0.",
}
_CLIP: Table = {"text_model.": "", "embeddings.": "embeddings.", "encoder.": "encoder."}
_CLIP |= {"final_layer_norm.": "final_layer_norm."}  # as merging tools write it
_OPEN_CLIP_ENDS: Table = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.": "embeddings.token_embedding.",
    "ln_final.": "final_layer_norm.",
}
_OPEN_CLIP_LAYER: Table = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.in_proj_": "self_attn.in_proj_",
    "attn.out_proj.": "self_attn.out_proj.",
}
_THIRDS = ("q_proj", "k_proj", "v_proj")
_PROJECTION = "text_projection"
_VAE_PROJECTION = re.compile(r"^(encoder|decoder)\.mid_block\.attentions\.0\.to_.*\.weight$")

NOT_READ = (
    r"^model_ema\.",  # a second copy of the UNet; what everybody draws with is the first
    r"^first_stage_model\.(loss|model_ema)\.",
    r"^(sqrt_|log_one_minus_|posterior_)?\w*alphas_cumprod\w*$",
    r"^(betas|logvar|scale_factor|global_step|v_pred|ztsnr|edm_mean|edm_std)$",
    r"^posterior_(variance|log_variance_clipped|mean_coef[12]|mean_coef)$",
    r"^(denoiser|embedding_manager)\.",
    r"\.(logit_scale|attn_mask|position_ids)$",
)
"""Names that no network reads: noise schedules, the discriminator of the autoencoder, buffers."""


@dataclasses.dataclass(frozen=True)
class TransposedTensor(StoredTensor):
    """A stored matrix whose transpose is meant; ``shape`` is that of the transpose."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        as_stored = StoredTensor(self.path, self.offset, self.shape[::-1], self.dtype)
        return np.ascontiguousarray(np.asarray(as_stored, dtype).T)


def diffusers_tensors(
    tensors: Mapping[str, StoredTensor], family: Family
) -> tuple[dict[str, dict[str, StoredTensor]], list[str]]:
    """The tensors of a single file by component and by today's names. Nothing is read.

    Args:
      tensors: of the file, see :func:`~.safetensors_files.read_header`.
      family: what the file is.

    Returns:
      For each component of ``family`` its tensors; and the names that have no place in it. A tensor
      that is missing shows when a component is filled (``convert.py``).
    """
    tables = _tables(family)
    found: dict[str, dict[str, StoredTensor]] = {component: {} for _, component, _ in tables}
    leftover: list[str] = []
    for name, tensor in tensors.items():
        if any(re.search(pattern, name) for pattern in NOT_READ):
            continue
        prefix, component, table = next(
            (row for row in tables if name.startswith(row[0])), ("", "", {})
        )
        here = _renamed(name.removeprefix(prefix), table)
        if here is None:
            if not _is_unused(name, component, family):
                leftover.append(name)
            continue
        for part, its_tensor in _parts(here, tensor).items():
            if part in found[component]:  # two spellings of one name in one file
                leftover.append(name)
            found[component][part] = its_tensor
    return found, leftover


def _tables(family: Family) -> list[tuple[str, str, Table]]:
    """Prefix, component and table, for each component."""
    configs = family.configs
    tables = [
        (UNET_PREFIX, "unet", _unet_table(configs["unet"])),
        (VAE_PREFIX, "vae", _vae_table(configs["vae"])),
    ]
    for component, place in family.text_encoders.items():
        table = _CLIP if place.layout == "clip" else _open_clip_table(configs[component])
        tables.append((place.prefix, component, table))
    return tables


def _renamed(name: str, table: Table) -> str | None:
    """``name`` with the longest prefix that ``table`` has replaced; None where it has none."""
    longest = max(map(len, table), default=0)
    for end in range(min(len(name), longest), 0, -1):
        if (here := table.get(name[:end])) is not None:
            return here + name[end:]
    return None


def _below(there: str, here: str, table: Table) -> Table:
    return {there + end: here + ours for end, ours in table.items()}


def _unet_table(config: Config) -> Table:
    """Blocks are numbered through in the file: ``layers_per_block`` layers and a change of
    resolution on the way down, one layer more on the way up.
    """
    count, depth = len(config["block_out_channels"]), config["layers_per_block"]
    table = dict(_UNET_ENDS)
    for block in range(count):
        for layer in range(depth + 1):
            number = 1 + block * (depth + 1) + layer
            down, there = f"down_blocks.{block}.", f"input_blocks.{number}."
            table[f"{there}0.op."] = f"{down}downsamplers.0.conv."
            table |= _below(f"{there}0.", f"{down}resnets.{layer}.", _UNET_RESNET)
            table[f"{there}1."] = f"{down}attentions.{layer}."
            up, there = f"up_blocks.{block}.", f"output_blocks.{number - 1}."
            table |= _below(f"{there}0.", f"{up}resnets.{layer}.", _UNET_RESNET)
            table[f"{there}1."] = f"{up}attentions.{layer}."
            for place in "12":  # behind the attention, where there is one
                table[f"{there}{place}.conv."] = f"{up}upsamplers.0.conv."
    for place, here in (("0", "resnets.0."), ("2", "resnets.1.")):
        table |= _below(f"middle_block.{place}.", f"mid_block.{here}", _UNET_RESNET)
    table["middle_block.1."] = "mid_block.attentions.0."
    return table


def _vae_table(config: Config) -> Table:
    """The file numbers the decoder's blocks from the image on, diffusers from the latent on."""
    count, depth = len(config["block_out_channels"]), config["layers_per_block"]
    table = dict(_VAE_ENDS)
    for half in ("encoder", "decoder"):
        there, here = f"{half}.mid.", f"{half}.mid_block."
        table |= _below(f"{there}block_1.", f"{here}resnets.0.", _VAE_RESNET)
        table |= _below(f"{there}block_2.", f"{here}resnets.1.", _VAE_RESNET)
        table |= _below(f"{there}attn_1.", f"{here}attentions.0.", _VAE_ATTENTION)
    for block in range(count):
        down, up = f"encoder.down_blocks.{block}.", f"decoder.up_blocks.{count - 1 - block}."
        table[f"encoder.down.{block}.downsample.conv."] = f"{down}downsamplers.0.conv."
        table[f"decoder.up.{block}.upsample.conv."] = f"{up}upsamplers.0.conv."
        for layer in range(depth + 1):
            layers = f"resnets.{layer}."
            table |= _below(f"encoder.down.{block}.block.{layer}.", down + layers, _VAE_RESNET)
            table |= _below(f"decoder.up.{block}.block.{layer}.", up + layers, _VAE_RESNET)
    return table


def _open_clip_table(config: Config) -> Table:
    table = dict(_OPEN_CLIP_ENDS)
    for layer in range(config["num_hidden_layers"]):
        there, here = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        table |= _below(there, here, _OPEN_CLIP_LAYER)
    if "projection_dim" in config:
        table[_PROJECTION] = f"{_PROJECTION}.weight"
    return table


def _is_unused(name: str, component: str, family: Family) -> bool:
    """Whether a tensor belongs to the part of a text encoder behind the layer that feeds the UNet:
    its projection, which ComfyUI saves for every encoder, and OpenCLIP's last layer.
    """
    place = family.text_encoders.get(component)
    if place is None:
        return False
    name = name.removeprefix(place.prefix)
    if place.layout == "clip":
        return name == f"{_PROJECTION}.weight"
    next_layer = family.configs[component]["num_hidden_layers"]
    return name == _PROJECTION or name.startswith(f"transformer.resblocks.{next_layer}.")


def _parts(name: str, tensor: StoredTensor) -> dict[str, StoredTensor]:
    """What one tensor of the file is here, by the names of its parts."""
    if name == f"{_PROJECTION}.weight":
        shape = tensor.shape[::-1]
        return {name: TransposedTensor(tensor.path, tensor.offset, shape, tensor.dtype)}
    if _VAE_PROJECTION.search(name) and tensor.shape[2:] == (1, 1):
        return {name: dataclasses.replace(tensor, shape=tensor.shape[:2])}
    attention, in_proj, kind = name.partition("in_proj_")
    if not in_proj or not tensor.shape or tensor.shape[0] % len(_THIRDS):
        return {name: tensor}
    shape = (tensor.shape[0] // len(_THIRDS), *tensor.shape[1:])
    length = int(np.prod(shape)) * tensor.dtype.itemsize
    return {
        f"{attention}{third}.{kind}": dataclasses.replace(
            tensor, offset=tensor.offset + number * length, shape=shape
        )
        for number, third in enumerate(_THIRDS)
    }
