"""Every option, each written once, and how options are read.

A file for each group of options (``data``, ``model``, ``method``, ``objective``, ``optimizer``,
``devices``, ``recording``), all of them together in ``training``; ``sampling``, ``masks``,
``gate``, ``serving`` and ``fit_start`` for the other commands. ``options`` says what an option is,
``presets`` names sets of them, ``reading`` turns YAML and ``key=value`` into a
:class:`TrainConfig`.
"""

from catversion_jax.config.data import DataOptions
from catversion_jax.config.devices import DeviceOptions
from catversion_jax.config.fit_start import FitOptions
from catversion_jax.config.gate import GateSettings
from catversion_jax.config.masks import MaskSettings
from catversion_jax.config.method import MethodOptions
from catversion_jax.config.model import ModelOptions
from catversion_jax.config.objective import ObjectiveOptions
from catversion_jax.config.optimizer import OptimizerOptions
from catversion_jax.config.presets import PRESETS
from catversion_jax.config.reading import (
    ALIASES,
    as_override,
    dump_config,
    load_config,
    make_config,
    option_table,
)
from catversion_jax.config.recording import RecordingOptions
from catversion_jax.config.sampling import SamplingSettings
from catversion_jax.config.training import (
    OPTION_DEFAULTS,
    TrainConfig,
    learning_options,
    with_shard,
)

__all__ = [
    "ALIASES",
    "OPTION_DEFAULTS",
    "PRESETS",
    "DataOptions",
    "DeviceOptions",
    "FitOptions",
    "GateSettings",
    "MaskSettings",
    "MethodOptions",
    "ModelOptions",
    "ObjectiveOptions",
    "OptimizerOptions",
    "RecordingOptions",
    "SamplingSettings",
    "TrainConfig",
    "as_override",
    "dump_config",
    "learning_options",
    "load_config",
    "make_config",
    "option_table",
    "with_shard",
]
