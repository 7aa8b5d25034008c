"""Named sets of options, each with the origin of its values."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

# A fifth of the official updates; on tiny-sd it keeps the prompt better and the likeness less
# (docs/results/study.md; docs/results/performance.md, "Fewer steps"). Not measured on Stable
# Diffusion itself.
_FAST: Mapping[str, Any] = {
    "num_positions": 4,
    "init": "class_word",
    "scope": "from_class_word",
    "learning_rate": 3e-2,
    "lr_scheduler": "cosine",
    "timestep_sampling": "stratified",
    "max_train_steps": 200,
}

PRESETS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
    {
        "none": {},
        # What differs from our defaults in RoyZhao926/CatVersion's configs and code.
        "official": {
            "logit_bias": 1.0,
            "crop": "squash",
            "mixed_precision": "no",
            "seed": 23,
            "when": "always",
            "validation_guidance_scale": 10.0,
        },
        "fast": _FAST,
        # What won on concepts that no choice had been made on (docs/results/quality.md).
        "quality": {
            **_FAST,
            "instance_prompt": "a {base_class}",
            "timestep_sampling": "proportional",
            "context_states": 16,
            "preserve_weight": 1.0,
            "make_masks": True,
        },
        "textual_inversion": {
            "method": "textual_inversion",
            "init": "class_word",  # paper; diffusers' initializer_token
            "instance_prompt": "object",  # paper and diffusers: neutral templates
            "learning_rate": 5e-4,  # diffusers' README, without its --scale_lr
            "lr_scheduler": "constant",  # diffusers' README
            "adam_weight_decay": 1e-2,  # diffusers: at 5e-4 it shrinks a vector 0.5 % in 1000 steps
            "max_train_steps": 3000,  # diffusers' README
            "train_batch_size": 4,  # diffusers' README: 1, accumulated 4 times
        },
    }
)
