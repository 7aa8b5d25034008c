"""Training options: one frozen dataclass, the only place where a default is written.

Values come from, weakest first: the defaults below, a preset, the YAML file, ``key=value`` on the
command line. Names follow diffusers' training scripts where those have the option. The origin of
each default stands beside it: "official" is the authors' released code (RoyZhao926/CatVersion),
"diffusers" its example scripts.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from catversion_jax.config.presets import PRESETS
from catversion_jax.config.ranges import range_problems
from catversion_jax.errors import CatVersionError, did_you_mean


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run. ``catversion train --help`` prints this table."""

    # What to personalize, and for which model
    concepts: str = _option(
        "", "folder of images, folder of folders, manifest, or dataset (required)"
    )
    pretrained_model_name_or_path: str = _option(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "diffusers folder or Hugging Face hub id (official: SD 1.5)",
    )
    revision: str | None = _option(None, "hub revision of the model")
    variant: str | None = _option(None, "weight file variant, for example fp16")
    output_dir: str = _option("catversion-out", "where everything is written")
    method: Literal["catversion", "textual_inversion"] = _option(
        "catversion",
        "what is learned: keys and values, or token embeddings in place of the class word",
    )
    preset: Literal["none", "official", "fast", "textual_inversion"] = _option(
        "none",
        "official: the authors' settings, quirks included; fast: a fifth of their updates for the "
        "same score on tiny-sd; textual_inversion: that method's usual ones (taken by itself with "
        "method=textual_inversion)",
    )

    # Images and words
    base_class: str | None = _option(None, "base class of concepts that do not name their own")
    dataset_split: str = _option("train", "split of a `datasets` dataset")
    image_column: str = _option("image", "dataset column with the image (diffusers)")
    concept_column: str | None = _option(None, "dataset column that names the concept of a row")
    base_class_column: str | None = _option(None, "dataset column with the base class")
    resolution: int | None = _option(
        None, "training size in pixels; default the model's own (SD 1.x: 512, official)"
    )
    crop: Literal["center", "squash"] = _option(
        "center", "center crop (diffusers) or squash to a square (official)"
    )
    random_flip: float = _option(
        0.5, "probability of a horizontal flip (official); per concept in concept.json"
    )
    alpha: Literal["white", "mask"] = _option(
        "white", "transparency: composite on white, or also use as the mask"
    )
    instance_prompt: str = _option(
        "{base_class}",
        "training prompt template (official: the bare word), or 'object' / 'style' template lists",
    )

    # What is learned
    num_positions: int = _option(
        1,
        "key/value pairs per adapted layer (official: prefix_length 1); vectors of "
        "textual_inversion",
    )
    layers: str = _option(
        "last3", "text-encoder layers: last3 (official), last<k>, all, or 9,10,11"
    )
    logit_bias: float = _option(
        0.0, "added to each concatenated logit (clean formula 0; official 1)"
    )
    init: Literal["normal", "zero", "class_word", "bos"] = _option(
        "normal",
        "start values: normal (official), zero, or the class word's or start token's own K and V "
        "(textual_inversion: embeddings)",
    )
    init_std: float = _option(1.0, "standard deviation of init=normal (official torch.randn)")
    adapt: Literal["key_value", "key", "value"] = _option(
        "key_value",
        "what of each pair is trained (official both); the other half keeps its start value, so "
        "init=class_word suits",
    )
    scope: Literal["all", "from_class_word", "class_word"] = _option(
        "all",
        "tokens that see the residual: all (official), the class word and what follows, or the "
        "class word alone",
    )
    when: Literal["class_word", "always"] = _option(
        "class_word",
        "a concept acts on prompts with its base-class words, or on every prompt (official)",
    )

    # Objective
    snr_gamma: float | None = _option(None, "min-SNR weight gamma (diffusers; 5 is usual); off")
    masked_training: bool = _option(False, "weigh the loss by the object masks (OneTrainer)")
    unmasked_weight: float = _option(0.1, "loss weight outside the mask (OneTrainer)")
    timestep_sampling: Literal["uniform", "stratified"] = _option(
        "uniform",
        "uniform (official), or stratified: one per n-th of the schedule in a batch of n, shifted "
        "evenly from step to step",
    )
    caption_dropout: float = _option(
        0.0, "probability of training on the empty prompt, residual attached"
    )

    # Optimization
    max_train_steps: int = _option(1000, "updates per concept (official)")
    train_batch_size: int = _option(2, "images per concept and step (official)")
    learning_rate: float = _option(
        1e-2, "never scaled by batch or devices (official 5e-3 x batch 2)"
    )
    lr_scheduler: Literal["constant", "linear", "cosine"] = _option(
        "constant", "after warm-up (official constant)"
    )
    lr_warmup_steps: int = _option(0, "linear warm-up updates (official 0)")
    adam_beta1: float = _option(0.9, "AdamW (official = torch default)")
    adam_beta2: float = _option(0.999, "AdamW (official = torch default)")
    adam_weight_decay: float = _option(1e-2, "AdamW (official = torch default)")
    adam_epsilon: float = _option(1e-8, "AdamW (official = torch default)")
    max_grad_norm: float | None = _option(
        None, "gradient-norm clip of each concept on its own (official: off)"
    )
    ema_decay: float | None = _option(
        None, "evaluate and export a moving average of what is learned (diffusers); off (official)"
    )
    early_stop: Literal["none", "dvar", "plateau"] = _option(
        "none",
        "end a concept when its evaluation loss has settled: its variance (DVAR, arXiv "
        "2302.04841) or its minimum",
    )
    early_stop_eps: float | None = _option(
        None, "dvar: share of the whole variance [0.3]; plateau: relative gain that counts [0.02]"
    )
    early_stop_window: int | None = _option(
        None, "steps the rule looks back [dvar 120, plateau 80: measured, docs/many_concepts.md]"
    )
    early_stop_min_steps: int | None = _option(
        None, "steps before the rule is asked [early_stop_window]"
    )
    seed: int = _option(42, "seed of concepts that do not name their own (Custom Diffusion)")

    # Devices
    mixed_precision: Literal["auto", "bf16", "no"] = _option(
        "auto", "frozen UNet and text encoder: bf16 on accelerators, float32 on CPU"
    )
    concepts_per_device: int | Literal["auto"] = _option(
        4, "concepts trained at once on each device; auto: as many as its memory holds (CPU: 4)"
    )
    gradient_checkpointing: Literal["auto", "none", "attention", "blocks"] = _option(
        "auto",
        "what the backward pass computes again to save memory; auto: as little as "
        "concepts_per_device allows (CPU: none)",
    )
    data_parallel: int = _option(
        1, "devices that share one concept's batch; the others hold other concepts"
    )
    coordinator_address: str | None = _option(
        None, "host:port of process 0 where several train one list; found by itself on Cloud TPU"
    )
    num_processes: int | None = _option(None, "how many they are")
    process_id: int | None = _option(None, "which of them this is, from 0")
    steps_per_dispatch: int | None = _option(
        None, "steps per call of the compiled program; 10, on CPU 1, where a loop halves the speed"
    )
    compilation_cache_dir: str | None = _option(
        "~/.cache/catversion/xla", "XLA's persistent compilation cache; null switches it off"
    )

    # What is recorded
    logging_steps: int = _option(10, "steps between rows of metrics.csv")
    eval_steps: int = _option(
        100, "steps between deterministic evaluation losses (fixed noise, fixed timesteps)"
    )
    num_eval_samples: int = _option(8, "noise/timestep pairs in the evaluation loss")
    validation_prompt: tuple[str, ...] = _option(
        ("a {base_class}", "a photo of a {base_class} on the beach"), "prompts of the sample grids"
    )
    validation_steps: int | None = _option(500, "steps between sample grids (official); null: none")
    num_validation_images: int = _option(2, "seeds per prompt in the grids (diffusers 4)")
    validation_inference_steps: int = _option(25, "DPM-Solver++ steps of the grids (diffusers)")
    validation_guidance_scale: float = _option(7.5, "guidance of the grids (diffusers)")
    checkpointing_steps: int = _option(250, "steps between orbax checkpoints (official)")
    checkpoints_total_limit: int = _option(2, "checkpoints kept")
    resume_from_checkpoint: Literal["latest", "none"] = _option(
        "latest", "continue what output_dir holds"
    )
    report_to: Literal["tensorboard", "none"] = _option(
        "tensorboard", "besides the CSV and JSONL files (diffusers)"
    )

    def __post_init__(self) -> None:
        problems = [p for f in dataclasses.fields(self) if (p := _type_problem(self, f.name))]
        if not problems:
            problems = range_problems(self)
        if problems:
            raise CatVersionError("\n".join(problems))


# What the early-stop rules use where the options say nothing: (eps, window).
EARLY_STOP_RULES: Mapping[str, tuple[float, int]] = types.MappingProxyType(
    {"dvar": (0.3, 120), "plateau": (0.02, 80)}
)


def early_stop_rule(config: TrainConfig) -> tuple[float, int]:
    """``early_stop_eps`` and ``early_stop_window`` of a config whose ``early_stop`` is on."""
    eps, window = EARLY_STOP_RULES[config.early_stop]
    return (
        eps if config.early_stop_eps is None else config.early_stop_eps,
        config.early_stop_window or window,
    )


# Names under which users of other trainers know an option.
ALIASES: Mapping[str, str] = types.MappingProxyType(
    {
        "train_data_dir": "concepts",
        "instance_data_dir": "concepts",
        "concepts_list": "concepts",
        "num_embeddings": "num_positions",
        "num_vectors": "num_positions",
        "prefix_init": "init",
        "prefix_init_std": "init_std",
        "prefix_logit_bias": "logit_bias",
    }
)

# Options that do not change what is learned: they may differ between a run and its continuation.
RECORDING_OPTIONS = frozenset(
    {
        "output_dir",
        "concepts",
        "concepts_per_device",
        "data_parallel",
        "gradient_checkpointing",
        "coordinator_address",
        "num_processes",
        "process_id",
        "steps_per_dispatch",
        "logging_steps",
        "eval_steps",
        "num_eval_samples",
        "compilation_cache_dir",
        "resume_from_checkpoint",
        "report_to",
        "checkpoints_total_limit",
        "checkpointing_steps",
        "validation_prompt",
        "validation_steps",
        "num_validation_images",
        "validation_inference_steps",
        "validation_guidance_scale",
    }
)


def learning_options(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the learned numbers, as plain JSON values; every file stores them."""
    recorded = RECORDING_OPTIONS
    if config.early_stop != "none":
        recorded -= {"eval_steps", "num_eval_samples"}  # they decide when a concept ends
    options = {k: v for k, v in dataclasses.asdict(config).items() if k not in recorded}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file and ``key=value`` overrides into a :class:`TrainConfig`.

    Relative ``concepts``, ``output_dir`` and model paths are taken from the working directory, as
    typed.

    Raises:
      CatVersionError: unreadable file, unknown key (with the nearest known one), wrong type or
      range.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values.update(_read_yaml(Path(path)))
    for item in overrides:
        key, sep, text = item.partition("=")
        if not sep:
            raise CatVersionError(
                f"{item!r}: an override is key=value, for example learning_rate=5e-3."
            )
        values[key] = _parse_value(ALIASES.get(key, key), text)
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
    """Build a config from plain values; the preset named in them fills what they leave open."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    values = {ALIASES.get(key, key): value for key, value in values.items()}
    if values.get("concepts", "") is None:
        del values["concepts"]
    unknown = [_unknown_key(key, names) for key in values if key not in names]
    if unknown:
        raise CatVersionError("\n".join(unknown))
    # A method's usual settings come with it unless another preset, or none, is asked for.
    method = values.get("method", "none")
    preset = values.get("preset", method if method in PRESETS else "none")
    if preset not in PRESETS:
        raise CatVersionError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}.")
    merged = {**PRESETS[preset], **values, "preset": preset}
    return TrainConfig(**{key: _coerce(key, value) for key, value in merged.items()})


def dump_config(config: TrainConfig) -> str:
    """YAML text that :func:`load_config` turns back into the same config."""
    plain = {
        k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()
    }
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def option_table() -> list[tuple[str, str, str]]:
    """(name, default, help) of every option, in order."""
    return [
        (f.name, "" if f.default is None else _plain(f.default), f.metadata["help"])
        for f in dataclasses.fields(TrainConfig)
    ]


def _plain(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatVersionError(
            f"--config {path}: cannot be read ({error.strerror}). Give the path of a YAML file; "
            "see configs/."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatVersionError(f"--config {path}: is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise CatVersionError(
            f"--config {path}: must hold `key: value` lines; see configs/ for examples."
        )
    return values


def _parse_value(key: str, text: str) -> Any:
    is_text = key in _TEXT_OPTIONS and text[:1] not in ("[", "'", '"')
    if is_text and text not in ("", "null"):
        return text  # prompts and paths such as "a {x}: y" need no quoting
    try:
        return yaml.safe_load(text) if text else None
    except yaml.YAMLError:
        raise CatVersionError(f"{key}={text!r}: the value is not valid YAML; quote it.") from None


def _unknown_key(key: str, names: Sequence[str]) -> str:
    hint = did_you_mean(key, names, cutoff=0.5)
    return f"{key!r}: no such option.{hint} `catversion train --help` lists all."


def _coerce(name: str, value: Any) -> Any:
    """YAML's looser spellings: 1e-2 reads as text, 5 for a float, one string for a list."""
    accepted = _accepted(name)
    if accepted == (tuple[str, ...],):
        if value is None:
            return ()
        return (
            (value,)
            if isinstance(value, str)
            else tuple(value)
            if isinstance(value, list)
            else value
        )
    if float in accepted and not isinstance(value, bool):
        if isinstance(value, int):
            return float(value)
        if isinstance(value, str):
            try:
                return float(value)
            except ValueError:
                return value
    if str in accepted and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if name == "layers" and isinstance(value, list):
        return ",".join(str(item) for item in value)
    # YAML 1.1 reads a bare `no` as false: mixed_precision=no is what diffusers users type.
    if value is False and "no" in _choices(accepted):
        return "no"
    return value


def _accepted(name: str) -> tuple[Any, ...]:
    hint = typing.get_type_hints(TrainConfig)[name]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


_TEXT_OPTIONS = frozenset(
    f.name
    for f in dataclasses.fields(TrainConfig)
    if set(_accepted(f.name)) & {str, tuple[str, ...]}
)


def _choices(accepted: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(c for a in accepted if typing.get_origin(a) is Literal for c in typing.get_args(a))


def _type_problem(config: TrainConfig, name: str) -> str | None:
    value, accepted = getattr(config, name), _accepted(name)
    choices = _choices(accepted)
    if value in choices:
        return None
    kinds = [kind for kind in accepted if typing.get_origin(kind) is not Literal]
    for kind in kinds:
        if typing.get_origin(kind) is tuple:
            if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
                return None
        elif isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool):
            return None
    hint = did_you_mean(str(value), choices)
    if not kinds:
        return f"{name}={value!r}: must be one of {', '.join(choices)}.{hint}"
    names = ["null" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds]
    return f"{name}={value!r}: must be {' or '.join([*names, *choices])}.{hint}"
