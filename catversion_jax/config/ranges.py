"""Whether the values of the training options can be meant, apart from their types."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from catversion_jax.config.training import TrainConfig


def range_problems(config: TrainConfig) -> list[str]:
    """What is wrong with values of the right type, one message each."""
    at_least = {
        "num_positions": 1, "max_train_steps": 1, "train_batch_size": 1, "lr_warmup_steps": 0,
        "concepts_per_device": 1, "data_parallel": 1, "steps_per_dispatch": 1, "logging_steps": 1,
        "eval_steps": 1, "num_eval_samples": 1, "validation_steps": 1, "num_validation_images": 1,
        "validation_inference_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1,
        "resolution": 8, "learning_rate": 0.0, "init_std": 0.0, "adam_weight_decay": 0.0,
        "adam_epsilon": 0.0,
        "early_stop_eps": 0.0, "early_stop_window": 1, "early_stop_min_steps": 0,
        "max_grad_norm": 0.0, "snr_gamma": 0.0, "seed": 0, "validation_guidance_scale": 0.0,
    }  # fmt: skip
    between = ("random_flip", "unmasked_weight", "caption_dropout", "ema_decay")
    problems = []
    for name, low in at_least.items():
        value = getattr(config, name)
        if value in (None, "auto"):
            continue
        if not (math.isfinite(value) and value >= low):
            problems.append(f"{name}={value}: must be at least {low} and finite.")
    for name in between:
        value = getattr(config, name)
        if value is not None and not 0.0 <= value <= 1.0:
            problems.append(f"{name}={getattr(config, name)}: must lie within 0..1.")
    if config.seed >= 2**32:
        problems.append(f"seed={config.seed}: must be below 2**32.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0.0 <= getattr(config, name) < 1.0:
            problems.append(f"{name}={getattr(config, name)}: must be at least 0 and below 1.")
    if not math.isfinite(config.logit_bias):
        problems.append(f"logit_bias={config.logit_bias}: must be finite.")
    if config.method == "textual_inversion":
        only = {"when": "class_word", "adapt": "key_value", "scope": "all"}
        problems += [
            f"{name}={getattr(config, name)}: must be {value} with method=textual_inversion, "
            "whose vectors stand for the class word."
            for name, value in only.items()
            if getattr(config, name) != value
        ]
    problems += _early_stop_problems(config)
    problems += _process_problems(
        config.coordinator_address, config.num_processes, config.process_id
    )
    if not config.concepts:
        problems.append(
            "concepts: is required. Give a folder of images (with base_class=...), a folder of "
            "folders, or a manifest, for example concepts=photos/teapot base_class=teapot."
        )
    if config.train_batch_size % config.data_parallel:
        problems.append(
            f"train_batch_size={config.train_batch_size}: must be a multiple of data_parallel="
            f"{config.data_parallel}, which splits each concept's batch."
        )
    return problems


def _early_stop_problems(config: TrainConfig) -> list[str]:
    from catversion_jax.config.training import early_stop_rule

    if config.early_stop == "none":
        return []
    _, window = early_stop_rule(config)
    if 2 * config.eval_steps <= window:
        return []
    return [
        f"early_stop={config.early_stop}: early_stop_window={window} must hold at least two "
        f"evaluations, one every eval_steps={config.eval_steps}. Use "
        f"eval_steps={max(1, window // 10)}."
    ]


def _process_problems(address: str | None, count: int | None, number: int | None) -> list[str]:
    if address is None and count is None and number is None:
        return []
    if address is None or count is None or number is None:
        return [
            "coordinator_address, num_processes and process_id belong together: give all three, or "
            "none on Cloud TPU."
        ]
    if 0 <= number < count:
        return []
    return [f"process_id={number}: must lie within 0..num_processes - 1 = {count - 1}."]
