"""All options of a training run.

Values come from, weakest first: the defaults in the groups, a preset, the YAML file, ``key=value``
on the command line. Names follow diffusers' training scripts where those have the option.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from catversion_jax.config.data import DataOptions
from catversion_jax.config.devices import DeviceOptions
from catversion_jax.config.method import MethodOptions
from catversion_jax.config.model import ModelOptions
from catversion_jax.config.objective import ObjectiveOptions
from catversion_jax.config.optimizer import OptimizerOptions
from catversion_jax.config.options import Options, option, statement_of
from catversion_jax.config.recording import RecordingOptions
from catversion_jax.errors import shown
from catversion_jax.runtime.shards import find_shard

G = TypeVar("G", bound=Options)


@dataclasses.dataclass(frozen=True)
class TrainConfig(
    # A dataclass lists the fields of its last base first.
    RecordingOptions,
    DeviceOptions,
    OptimizerOptions,
    ObjectiveOptions,
    MethodOptions,
    ModelOptions,
    DataOptions,
):
    """The whole run.

    Every option of every group is an attribute: ``TrainConfig(concepts="photos", base_class="cup",
    learning_rate=5e-3)``. What computes takes the groups that it needs. ``catversion train --help``
    lists all options.

    Raises:
      CatVersionError: values of a wrong type, outside their range, or that contradict each other;
        the message lists all of them.
    """

    preset: Literal["none", "official", "fast", "quality", "textual_inversion"] = option(
        "none",
        "Named set of options, over which options that are given win. official: the authors' "
        "settings, quirks included; fast: a fifth of their updates, which on tiny-sd keeps the "
        "prompt better and the likeness less; quality: fast with states behind the text "
        "encoder's output and the plain model kept outside the object, which is closer to the "
        "photos and takes longer (masks that photos lack are made); textual_inversion: the usual "
        "settings of that method, which method=textual_inversion takes by itself.",
        decides_result=True,
    )

    @property
    def data_options(self) -> DataOptions:
        """Images and words."""
        return self._group(DataOptions)

    @property
    def model_options(self) -> ModelOptions:
        """Which frozen model."""
        return self._group(ModelOptions)

    @property
    def method_options(self) -> MethodOptions:
        """What is learned."""
        return self._group(MethodOptions)

    @property
    def objective_options(self) -> ObjectiveOptions:
        """Batch and loss of a step."""
        return self._group(ObjectiveOptions)

    @property
    def optimizer_options(self) -> OptimizerOptions:
        """How long and how fast."""
        return self._group(OptimizerOptions)

    @property
    def device_options(self) -> DeviceOptions:
        """On which devices."""
        return self._group(DeviceOptions)

    @property
    def recording_options(self) -> RecordingOptions:
        """What is written, and where."""
        return self._group(RecordingOptions)

    def _group(self, group: type[G]) -> G:
        names = [field.name for field in dataclasses.fields(group)]
        return group(**{name: getattr(self, name) for name in names})

    def contradictions(self) -> list[str]:
        """What is wrong within and between the groups."""
        problems = super().contradictions()
        if not self.concepts:
            problems.append(
                "concepts: is required. Give a folder of images (with base_class=...), a folder of "
                "folders, or a manifest, for example concepts=photos/teapot base_class=teapot."
            )
        if self.max_train_steps == 0 and self.init != "predicted":
            problems.append(
                f"max_train_steps=0: leaves the start values as they are, and those of init="
                f"{self.init} are no concept. Use 1 or more, or init=predicted."
            )
        for name in ("start", "start_clip"):
            if getattr(self, name) is not None and self.init != "predicted":
                problems.append(
                    f"{name}={shown(getattr(self, name))}: is read with init=predicted only, and "
                    f"init is {self.init}. Give init=predicted too, or leave {name} out."
                )
        if self.train_batch_size % self.data_parallel:
            problems.append(
                f"train_batch_size={self.train_batch_size}: must be a multiple of data_parallel="
                f"{self.data_parallel}, which splits each concept's batch."
            )
        if self.retrain == "failed" and self.lr_scheduler != "constant":
            problems.append(
                f"retrain=failed: needs lr_scheduler=constant, not {self.lr_scheduler}, whose "
                "learning rate has ended after max_train_steps. Give another output_dir and more "
                "max_train_steps."
            )
        if self.early_stop != "none":
            _, window = self.early_stop_rule
            if 2 * self.eval_steps > window:
                problems.append(
                    f"early_stop={self.early_stop}: early_stop_window={window} must hold at least "
                    f"two evaluations, one every eval_steps={self.eval_steps}. Use "
                    f"eval_steps={max(1, window // 10)}."
                )
        return problems


GROUPS: tuple[type[Options], ...] = (
    DataOptions,
    ModelOptions,
    TrainConfig,
    MethodOptions,
    ObjectiveOptions,
    OptimizerOptions,
    DeviceOptions,
    RecordingOptions,
)
"""In the order in which people read about them; of ``TrainConfig`` its own option."""


OPTION_DEFAULTS: Mapping[str, Any] = types.MappingProxyType(
    {
        field.name: list(field.default) if isinstance(field.default, tuple) else field.default
        for field in dataclasses.fields(TrainConfig)
    }
)
"""Every option's default, as JSON and YAML have it."""


def with_shard(config: TrainConfig, environment: Mapping[str, str]) -> TrainConfig:
    """``config`` with the number of its shard in place of null or ``auto``.

    Raises:
      CatVersionError: the variables in ``environment`` do not say it.
    """
    return dataclasses.replace(config, shard=str(find_shard(config.shard, environment)))


def learning_options(config: TrainConfig) -> dict[str, Any]:
    """The options that decide the learned numbers, as plain JSON values; every file stores them."""
    return {
        name: value for name, value in plain_values(config).items() if _decides_result(config, name)
    }


def plain_values(config: TrainConfig) -> dict[str, Any]:
    """All options as JSON and YAML have them."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _decides_result(config: TrainConfig, name: str) -> bool:
    decides = statement_of(TrainConfig, name).decides_result
    return config.early_stop != "none" if decides == "with early_stop" else decides
