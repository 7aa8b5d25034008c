"""What is compared: every arm of the study in one table.

An arm is a way to personalize. Arms that train change options of the public trainer; what no arm
changes is ``SHARED``, and ``OURS`` is the setting the ablations vary, one option at a time. To
change the recipe of the study, change ``OURS``: every ablation moves with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from catversion_jax.config.presets import PRESETS

Kind = Literal["plain", "trainer", "dreambooth"]

# The prompt that training shows, the same for every method that can choose.
PROMPT = "a {base_class}"
SHARED: Mapping[str, Any] = {
    "instance_prompt": PROMPT,
    "validation_steps": None,
    "report_to": "none",
    "eval_steps": 100,
    "checkpointing_steps": 200,
    "checkpoints_total_limit": 1,
    "logging_steps": 50,
}
# CatVersion with what the trainer learned best in this world. This recipe and those of the other
# methods were chosen on tools/tiny_sd/concepts.py --development, not on the concepts of the study.
OURS: Mapping[str, Any] = {**PRESETS["fast"], "train_batch_size": 2}
# Textual Inversion, with twice the UNet samples.
INVERSION: Mapping[str, Any] = {
    "method": "textual_inversion",
    "instance_prompt": PROMPT,
    "learning_rate": 1e-2,
    "lr_scheduler": "cosine",
    "timestep_sampling": "stratified",
    "max_train_steps": 400,
    "train_batch_size": 2,
}
DREAMBOOTH: Mapping[str, Any] = {"learning_rate": 1e-4, "steps": 200, "batch_size": 2}
# Half of OURS' updates, and what may let them stand: one thing more in each line.
HALF: Mapping[str, Any] = {**OURS, "max_train_steps": 100, "learning_rate": 1e-1}
PRESERVING: Mapping[str, Any] = {"preserve_weight": 1.0}
NOISIER: Mapping[str, Any] = {**PRESERVING, "timestep_sampling": "proportional"}
LONGER_CONTEXT: Mapping[str, Any] = {**NOISIER, "context_states": 16}
QUALITY: Mapping[str, Any] = {**OURS, **PRESETS["quality"]}
# From the model's own concept encoder.
PREDICTED: Mapping[str, Any] = {**OURS, "init": "predicted"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to personalize.

    Attributes:
      name: also its folder's name.
      question: the table it belongs to; a key of :data:`QUESTIONS`.
      text: what it is, for the page.
      kind: nothing at all, the public trainer, or the outside baseline.
      options: of the trainer, or of the outside baseline.
      sees_masks: whether training sees the photos' masks; scores always do.
    """

    name: str
    question: str
    text: str
    kind: Kind = "trainer"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sees_masks: bool = True

    @property
    def is_main(self) -> bool:
        """Whether it is drawn with all seeds on all concepts."""
        return self.question == "methods"


QUESTIONS: Mapping[str, str] = {
    "methods": "Methods",
    "recipes": "Half the updates, and more in the loss",
    "layers": "Which layers",
    "num_positions": "How many positions",
    "adapt": "Keys, values, or both",
    "init": "Start values",
    "logit_bias": "Logit bias",
    "learning_rate": "Learning rate",
    "max_train_steps": "Training steps",
    "train_batch_size": "Images of a step, as many in all",
    "scope": "Which tokens see the residual",
    "timestep_sampling": "Timesteps of a batch",
    "lr_scheduler": "Learning-rate schedule",
    "ema_decay": "Moving average",
    "masked_training": "Masked loss",
    "adam_weight_decay": "Weight decay",
    "textual_inversion": "Textual Inversion's own settings",
    "dreambooth": "DreamBooth's own settings",
}
# Ablations: one option of OURS at a time; the value OURS has already is left out of the arms.
VARIED: Mapping[str, tuple[Any, ...]] = {
    "num_positions": (1, 2, 4, 8),
    "adapt": ("key", "value", "key_value"),
    "init": ("normal", "zero", "class_word", "bos"),
    "logit_bias": (0.0, 1.0),
    "learning_rate": (3e-3, 1e-2, 3e-2, 1e-1),
    "max_train_steps": (100, 200, 400, 800),
    "scope": ("all", "from_class_word", "class_word"),
    "timestep_sampling": ("uniform", "stratified"),
    "lr_scheduler": ("constant", "cosine"),
    "ema_decay": (None, 0.98),
    "masked_training": (False, True),
    "adam_weight_decay": (0.0, 1e-2),
}
# What the option is where OURS does not say; tests hold it against the trainer's own defaults.
OTHERWISE: Mapping[str, Any] = {
    "layers": "last3",
    "adapt": "key_value",
    "logit_bias": 0.0,
    "ema_decay": None,
    "masked_training": False,
    "adam_weight_decay": 1e-2,
}


def make_arms(num_layers: int) -> dict[str, Arm]:
    """Every arm by name, the methods first.

    Args:
      num_layers: layers of the text encoder that feed the UNet.
    """
    arms = [*_methods(), *_recipes(), *_layers(num_layers), *_batch_sizes()]
    arms += [
        _changed(option, value)
        for option, values in VARIED.items()
        for value in values
        if value != ours(option)
    ]
    arms += [
        Arm(
            f"textual_inversion,{option}={value}",
            "textual_inversion",
            f"{option} {value}",
            options={**INVERSION, "num_positions": 1, option: value},
        )
        for option, values in {
            "learning_rate": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
            "max_train_steps": (200, 800),
            "num_positions": (4,),
        }.items()
        for value in values
        if value != INVERSION.get(option)
    ]
    arms += [
        Arm(
            f"dreambooth,{option}={value}",
            "dreambooth",
            f"{option} {value}",
            "dreambooth",
            {**DREAMBOOTH, option: value},
        )
        for option, values in {
            "learning_rate": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4),
            "steps": (100, 200, 400),
        }.items()
        for value in values
        if value != DREAMBOOTH[option]
    ]
    return {arm.name: arm for arm in arms}


def ours(option: str) -> Any:
    """The value of an option in the setting that the ablations vary."""
    return OURS[option] if option in OURS else OTHERWISE[option]


def base_of(question: str) -> str:
    """The arm of the methods' table that a question's ablations are compared with."""
    return question if question in ("textual_inversion", "dreambooth") else "catversion"


def _methods() -> list[Arm]:
    official = {
        "preset": "official",
        "instance_prompt": "{base_class}",
        "learning_rate": 1e-2,
        "max_train_steps": 1000,
    }
    return [
        Arm("none", "methods", "no personalization: the class word", "plain"),
        Arm(
            "textual_inversion",
            "methods",
            "Textual Inversion, 1 vector",
            options={**INVERSION, "num_positions": 1},
        ),
        Arm(
            "textual_inversion_preserving",
            "methods",
            "Textual Inversion, 4 vectors, preserved",
            options={**INVERSION, **NOISIER, "num_positions": 4},
        ),
        Arm(
            "textual_inversion_preserving_1",
            "methods",
            "Textual Inversion, 1 vector, preserved",
            options={**INVERSION, **NOISIER, "num_positions": 1},
        ),
        Arm("dreambooth", "methods", "DreamBooth, whole UNet", "dreambooth", DREAMBOOTH),
        Arm(
            "dreambooth_preserving",
            "methods",
            "DreamBooth, whole UNet, preserved",
            "dreambooth",
            {**DREAMBOOTH, **NOISIER},
        ),
        Arm("catversion_official", "methods", "CatVersion, official settings", options=official),
        Arm(
            "predicted_0",
            "methods",
            "CatVersion, predicted from the photos",
            options={**PREDICTED, "max_train_steps": 0},
        ),
        Arm(
            "predicted_25",
            "methods",
            "CatVersion, predicted, 25 updates",
            options={**PREDICTED, "max_train_steps": 25},
        ),
        Arm("catversion", "methods", "CatVersion, preset=fast", options=OURS),
        Arm(
            "longer_context",
            "methods",
            "CatVersion, preset=quality",
            options=QUALITY,
        ),
    ]


def _recipes() -> list[Arm]:
    """What the development concepts were asked about the next ``preset=fast``."""
    given: dict[str, tuple[str, Mapping[str, Any]]] = {
        "half": ("100 updates at 0.1", HALF),
        "half_1": ("the same, 1 position", {**HALF, "num_positions": 1}),
        "half_preserving": ("100 updates, plain model preserved", {**HALF, **PRESERVING}),
        "half_noisier": ("the same, noisier timesteps", {**HALF, **NOISIER}),
        "half_longer_context": ("the same, 16 context states", {**HALF, **LONGER_CONTEXT}),
        "half_longer_context,preserve_weight=3": (
            "the same, preserved three times as much",
            {**HALF, **LONGER_CONTEXT, "preserve_weight": 3.0},
        ),
        "half_longer_context,learning_rate=0.05": (
            "100 updates at 0.05 with all of it",
            {**HALF, **LONGER_CONTEXT, "learning_rate": 0.05},
        ),
    }
    made = Arm(
        "longer_context_made_masks",
        "recipes",
        "preset=quality with masks that it makes itself",
        options=QUALITY,
        sees_masks=False,
    )
    arms = [Arm(name, "recipes", text, options=options) for name, (text, options) in given.items()]
    return [*arms, made]


def _layers(num_layers: int) -> list[Arm]:
    choices = [str(layer) for layer in range(num_layers)]
    choices += [f"last{count}" for count in (2, 3) if count < num_layers] + ["all"]
    return [_changed("layers", choice) for choice in choices if choice != ours("layers")]


def _batch_sizes() -> list[Arm]:
    """Others than OURS, with as many samples."""
    samples = OURS["train_batch_size"] * OURS["max_train_steps"]
    return [
        Arm(
            f"train_batch_size={size}",
            "train_batch_size",
            f"{size}, {samples // size} updates",
            options={**OURS, "train_batch_size": size, "max_train_steps": samples // size},
        )
        for size in (1, 4)
    ]


def _changed(option: str, value: Any) -> Arm:
    text = value_text(value)
    return Arm(f"{option}={value}", option, text, options={**OURS, option: value})


def value_text(value: Any) -> str:
    """An option's value as the tables show it."""
    if value is None or isinstance(value, bool):
        return "on" if value else "off"
    return str(value)
