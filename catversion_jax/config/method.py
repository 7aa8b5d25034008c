"""What a concept learns."""

from __future__ import annotations

import dataclasses
from typing import Literal

from catversion_jax.config.options import Options, option

START_FILE = "start.safetensors"
"""The concept encoder that a model folder may have of its own."""
UPDATES_AFTER_PREDICTION = 25
"""Usual updates of a concept that starts from a prediction."""


@dataclasses.dataclass(frozen=True)
class MethodOptions(Options):
    """What is learned."""

    method: str = option(
        "catversion",
        "What is learned: catversion adds keys and values to the text encoder's attention, "
        "textual_inversion learns token embeddings in place of the class word.",
        decides_result=True,
    )
    num_positions: int = option(
        1,
        "Number of key/value pairs in each adapted layer (official: prefix_length 1); with "
        "textual_inversion the number of token embeddings.",
        decides_result=True,
        at_least=1,
        aliases=("num_embeddings", "num_vectors"),
    )
    layers: str = option(
        "last3",
        "Text-encoder layers that get learned keys and values: last3 (official), last<k>, all, or "
        "indices counted from 0, such as 9,10,11. Stable Diffusion XL has two text encoders: one "
        "choice for both, or one for each, such as last3/28,29,30,31.",
        decides_result=True,
    )
    logit_bias: float = option(
        0.0,
        "Number added to the attention logit of every learned key (0 is the paper's formula, the "
        "official code adds 1).",
        decides_result=True,
        aliases=("prefix_logit_bias",),
    )
    context_states: int = option(
        0,
        "Number of learned states behind the text encoder's output, which the UNet reads beside "
        "the prompt's tokens (behind that of each encoder with Stable Diffusion XL). 0 is the "
        "paper's method; 16 can say colours that keys and values cannot, and want "
        "preserve_weight.",
        decides_result=True,
        at_least=0,
        at_most=1024,
    )
    init: Literal["normal", "zero", "class_word", "bos", "predicted"] = option(
        "normal",
        "Start values of what is learned: normal draws them at random (official), zero sets them "
        "to 0, class_word and bos copy the text encoder's own keys and values at the class word "
        "or the start token (with textual_inversion: embeddings), predicted takes them from the "
        "photos by a concept encoder.",
        decides_result=True,
        aliases=("prefix_init",),
    )
    start: str | None = option(
        None,
        "File of the concept encoder for init=predicted, as `catversion fit-start` writes it; null "
        "takes the model's own start.safetensors. Its content decides the result, not its name.",
        decides_result=False,
    )
    start_clip: str | None = option(
        None,
        "Folder of the CLIP that the concept encoder sees the photos with; null takes the one that "
        "the file names.",
        decides_result=False,
    )
    init_std: float = option(
        1.0,
        "Standard deviation of the start values of init=normal (official: torch.randn, so 1).",
        decides_result=True,
        at_least=0.0,
        aliases=("prefix_init_std",),
    )
    adapt: Literal["key_value", "key", "value"] = option(
        "key_value",
        "Which part of each key/value pair is trained (official: both); the other part keeps its "
        "start value, for which init=class_word is suitable.",
        decides_result=True,
    )
    scope: Literal["all", "from_class_word", "class_word"] = option(
        "all",
        "Tokens that attend to the learned keys and values: all of them (official), the class "
        "word and what follows it, or the class word alone.",
        decides_result=True,
    )
    when: Literal["class_word", "always"] = option(
        "class_word",
        "Prompts that a concept acts on: those that contain its base class, or every prompt "
        "(official).",
        decides_result=True,
    )
