"""A UNet's ``config.json`` as a checked, hashable value with one entry per block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from catversion_jax.errors import CatVersionError, shown
from catversion_jax.models.layers.resnet import ACTIVATIONS, check_groups
from catversion_jax.models.weights.hf_config import (
    check_integers,
    check_numbers,
    check_supported,
)

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}
MID_BLOCK = "UNetMidBlock2DCrossAttn"
MID_BLOCKS = {MID_BLOCK: True, "UNetMidBlock2D": False}

# diffusers' own defaults: published SD 1.x files lack every key that was added after version 0.6.
DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": MID_BLOCK,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "only_cross_attention": False,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "sample_size": 64,
    "time_cond_proj_dim": None,
}

ONLY: dict[str, tuple[Any, ...]] = {
    "act_fn": tuple(ACTIVATIONS),
    "addition_embed_type": ("text_time", None),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": (*MID_BLOCKS, None),
    "resnet_out_scale_factor": (1.0, 1),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}

_MOST_CHANNELS = 2**14
_MOST_BLOCKS = 8
RANGES = {
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "norm_num_groups": (1, _MOST_CHANNELS),
    "sample_size": (1, 2**12),
}
PER_BLOCK_RANGES = {
    "layers_per_block": (1, 16),
    "num_heads": (1, 2**14),
    "cross_attention_dim": (1, 2**14),
}

_MOST_DEPTH = 32

SCALARS: dict[str, tuple[type, ...]] = {
    "in_channels": (int,),
    "out_channels": (int,),
    "norm_num_groups": (int,),
    "norm_eps": (float, int),
    "freq_shift": (int, float),
    "flip_sin_to_cos": (bool,),
    "use_linear_projection": (bool,),
}

ADDED_WIDTHS = {
    "addition_time_embed_dim": (1, _MOST_CHANNELS),
    "projection_class_embeddings_input_dim": (1, 2**17),
}
"""Ranges of what ``addition_embed_type="text_time"`` needs."""

IGNORED = frozenset(
    {
        "addition_embed_type_num_heads",  # acts with addition_embed_type="text", which is refused
        *ADDED_WIDTHS,  # act with addition_embed_type="text_time" only, which reads them
        "dropout",  # acts while the UNet itself is trained
        "mid_block_only_cross_attention",  # never reaches the mid blocks that are supported
        "upcast_attention",  # attention() always computes logits and softmax in float32
    }
)


@dataclasses.dataclass(frozen=True)
class AddedWidths:
    """Sizes of ``addition_embed_type="text_time"``, equation (3) of ``embeddings.py``.

    Attributes:
      time_embed_dim: width of the wave of one time id.
      width: of the pooled state and the waves of all time ids together.
    """

    time_embed_dim: int
    width: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str) -> AddedWidths | None:
        """The sizes; None where the UNet takes no added conditions.

        Raises:
          CatVersionError: one of them is missing or out of range.
        """
        if config.get("addition_embed_type") is None:
            return None
        values: dict[str, Any] = {key: config.get(key) for key in ADDED_WIDTHS}
        check_integers(values, ADDED_WIDTHS, source=source)
        return cls(*(int(values[key]) for key in ADDED_WIDTHS))


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """What decides a UNet's computation; tuples run from the outermost block to the innermost.

    ``num_heads`` is what the files call ``attention_head_dim``: since SD 1.x it has meant the
    number of heads. ``sample_size``, the latent positions per side that the UNet was trained on,
    decides nothing but the default resolution. ``added`` is None except in Stable Diffusion XL, and
    ``guidance_width`` except in latent consistency models.
    ``down_depths`` and ``up_depths`` have the number of transformer layers behind each residual
    block of each level; distilled models such as SSD-1B have fewer on the way down than on the way
    up.
    """

    in_channels: int
    out_channels: int
    flip_sin_to_cos: bool
    freq_shift: float
    act_fn: str
    norm_num_groups: int
    norm_eps: float
    use_linear_projection: bool
    has_mid_block: bool
    mid_cross_attention: bool
    block_out_channels: tuple[int, ...]
    down_cross_attention: tuple[bool, ...]
    up_cross_attention: tuple[bool, ...]
    layers_per_block: tuple[int, ...]
    down_depths: tuple[tuple[int, ...], ...]
    up_depths: tuple[tuple[int, ...], ...]
    num_heads: tuple[int, ...]
    cross_attention_dim: tuple[int, ...]
    only_cross_attention: tuple[bool, ...]
    sample_size: int
    guidance_width: int | None
    added: AddedWidths | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, source: str = "unet/config.json") -> UNetConfig:
        """Read a diffusers ``UNet2DConditionModel`` configuration; absent keys take diffusers'
        defaults.

        Raises:
          CatVersionError: a key asks for something unsupported, or the keys contradict each other.
        """
        check_supported(config, source=source, used=DEFAULTS.keys(), ignored=IGNORED, only=ONLY)
        values = {key: config.get(key, default) for key, default in DEFAULTS.items()}
        widths = _integers(values["block_out_channels"], "block_out_channels", source=source)
        count = len(widths)

        def per_block(key: str, kind: type) -> tuple[Any, ...]:
            return _per_block(values[key], key, kind, count, source=source)

        for key, kinds in SCALARS.items():
            if type(values[key]) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise CatVersionError(
                    f"{source}: {key}={shown(values[key])} must be a single {expected}. "
                    "Correct the configuration."
                )
        sample_size = DEFAULTS["sample_size"]
        if values["sample_size"] is not None:
            sample_size = values["sample_size"]
        check_integers({**values, "sample_size": sample_size}, RANGES, source=source)
        check_numbers(values, {"norm_eps": (0.0, 1.0), "freq_shift": (-1e3, 1e3)}, source=source)
        layers_per_block = per_block("layers_per_block", int)
        # Before anything is made that is as long as it says.
        _check_range("layers_per_block", layers_per_block, source=source)
        down_depths, up_depths = _depths(values, layers_per_block, source=source)
        parsed = cls(
            **{key: values[key] for key in SCALARS},
            act_fn=values["act_fn"],
            has_mid_block=values["mid_block_type"] is not None,
            mid_cross_attention=MID_BLOCKS.get(values["mid_block_type"], False),
            block_out_channels=widths,
            down_cross_attention=_block_types(
                values["down_block_types"], DOWN_BLOCKS, count, source=source
            ),
            up_cross_attention=_block_types(
                values["up_block_types"], UP_BLOCKS, count, source=source
            ),
            layers_per_block=layers_per_block,
            down_depths=down_depths,
            up_depths=up_depths,
            num_heads=per_block("attention_head_dim", int),
            cross_attention_dim=per_block("cross_attention_dim", int),
            only_cross_attention=per_block("only_cross_attention", bool),
            sample_size=sample_size,
            guidance_width=_guidance_width(values["time_cond_proj_dim"], source=source),
            added=AddedWidths.from_hf(config, source=source),
        )
        for key in PER_BLOCK_RANGES:
            _check_range(key, getattr(parsed, key), source=source)
        parsed._check_divisions(source)
        return parsed

    def _check_divisions(self, source: str) -> None:
        halvings = len(self.block_out_channels) - 1
        if self.sample_size % 2**halvings:
            raise CatVersionError(
                f"{source}: sample_size = {self.sample_size} must be a multiple of {2**halvings}, "
                f"since the network halves it {halvings} times. Correct the configuration."
            )
        check_groups(self.norm_num_groups, self.block_out_channels, source=source)
        uses_heads = [
            down or up
            for down, up in zip(
                self.down_cross_attention, reversed(self.up_cross_attention), strict=True
            )
        ]
        uses_heads[-1] = uses_heads[-1] or self.mid_cross_attention
        for width, heads, used in zip(
            self.block_out_channels, self.num_heads, uses_heads, strict=True
        ):
            if used and (heads < 1 or width % heads):
                raise CatVersionError(
                    f"{source}: attention_head_dim={list(self.num_heads)} is the number of heads "
                    f"of each block and must divide its width; {heads} does not divide {width}. "
                    "Correct the configuration."
                )


def _guidance_width(value: Any, *, source: str) -> int | None:
    if value is not None:
        bounds = {"time_cond_proj_dim": (4, _MOST_CHANNELS)}
        check_integers({"time_cond_proj_dim": value}, bounds, source=source)
    return value


def _integers(value: Any, key: str, *, source: str) -> tuple[int, ...]:
    if (
        not isinstance(value, Sequence)
        or not 1 <= len(value) <= _MOST_BLOCKS
        or not all(type(v) is int and 1 <= v <= _MOST_CHANNELS for v in value)
    ):
        raise CatVersionError(
            f"{source}: {key}={shown(value)} must be a list of at most {_MOST_BLOCKS} positive "
            f"integers up to {_MOST_CHANNELS}. Correct the configuration."
        )
    return tuple(value)


def _per_block(value: Any, key: str, kind: type, count: int, *, source: str) -> tuple[Any, ...]:
    """One value for all blocks, or a list with one for each."""
    entries = (value,) * count if isinstance(value, kind) else value
    fits = isinstance(entries, Sequence) and len(entries) == count
    # bool is a subclass of int: a flag where a number belongs is refused too.
    if not fits or not all(type(entry) is kind for entry in entries):
        raise CatVersionError(
            f"{source}: {key}={shown(value)} must be one {kind.__name__} or a list of {count} (one "
            "for each entry of block_out_channels). Another layout is not supported; correct the "
            "configuration."
        )
    return tuple(entries)


def _check_range(key: str, entries: Sequence[int], *, source: str) -> None:
    for value in entries:
        check_integers({key: value}, {key: PER_BLOCK_RANGES[key]}, source=source)


def _depths(
    values: Mapping[str, Any], layers_per_block: tuple[int, ...], *, source: str
) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """``down_depths`` and ``up_depths``.

    In the files ``reverse_transformer_layers_per_block`` runs from the innermost block outwards;
    without it the way up has the depths of the way down.
    """
    key = "transformer_layers_per_block"
    down, up = values[key], values[f"reverse_{key}"]
    nested = isinstance(down, Sequence) and any(isinstance(entry, Sequence) for entry in down)
    if up is None and nested:
        raise CatVersionError(
            f"{source}: {key}={shown(down)} has a list for a block, so "
            f"reverse_{key} must say the depths of the way up, which has one residual block more. "
            "Correct the configuration."
        )
    outwards = down if up is None else up[::-1] if isinstance(up, Sequence) else up
    return (
        _layer_depths(down, key, layers_per_block, source=source),
        _layer_depths(
            outwards, f"reverse_{key}", tuple(n + 1 for n in layers_per_block), source=source
        ),
    )


def _layer_depths(
    value: Any, key: str, layers: tuple[int, ...], *, source: str
) -> tuple[tuple[int, ...], ...]:
    """One number for all, a number for each block, or a list for each residual block in it."""
    blocks = value if isinstance(value, Sequence) else [value] * len(layers)
    expanded = [
        tuple(entry) if isinstance(entry, Sequence) else (entry,) * count
        for entry, count in zip(blocks, layers, strict=False)
    ]
    if len(blocks) != len(layers) or not all(
        len(depths) == count and all(type(n) is int and 1 <= n <= _MOST_DEPTH for n in depths)
        for depths, count in zip(expanded, layers, strict=True)
    ):
        raise CatVersionError(
            f"{source}: {key}={shown(value)} must be an integer within 1..{_MOST_DEPTH}, or a list "
            f"of {len(layers)} (one for each entry of block_out_channels) of such or of lists with "
            f"one for each residual block, here {list(layers)}. Correct the configuration."
        )
    return tuple(expanded)


def _block_types(
    value: Any, supported: Mapping[str, bool], count: int, *, source: str
) -> tuple[bool, ...]:
    """Whether each block has cross-attention."""
    names = value if isinstance(value, list | tuple) else ()
    if len(names) != count or not all(isinstance(n, str) and n in supported for n in names):
        raise CatVersionError(
            f"{source}: block types {shown(value)} must be {count} (one for each entry of "
            f"block_out_channels) out of {sorted(supported)}. Use a Stable Diffusion 1.x or 2.x "
            "model."
        )
    return tuple(supported[name] for name in names)
