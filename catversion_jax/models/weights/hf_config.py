"""Reading a Hugging Face ``config.json``: a key that changes the computation is never ignored.

A model's files come from strangers. Sizes are checked for type and range before anything is built
from them, since one wrong number can otherwise mean hours or all memory.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from catversion_jax.config.documents import read_text, without_repetition
from catversion_jax.errors import CatVersionError, listed, shown

_MOST_LISTED = 20

MAX_CONFIG_BYTES = 16 * 2**20
"""Of a configuration; those of known models have a few kB."""

Range = tuple[float, float]
"""The least and the largest value, both allowed."""

# Bookkeeping, initialization, training, text generation and labels: what every transformers model
# carries.
# fmt: off
TRANSFORMERS_IGNORED = frozenset({
    "architectures", "attention_dropout", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample",
    "dropout", "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "id2label", "initializer_factor",
    "initializer_range", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "problem_type", "projection_dim", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params",
    "temperature", "tf_legacy_loss", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_cache",
})
# fmt: on
"""Keys of transformers' ``PretrainedConfig`` that do not change what a frozen CLIP computes."""


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """Read a JSON object from ``folder/name``.

    Raises:
      CatVersionError: the file is missing, not JSON, or not an object.
    """
    path = Path(folder) / name
    if not path.exists():
        found = sorted(p.name for p in Path(folder).iterdir()) if Path(folder).is_dir() else None
        state = f"the folder holds {found}" if found is not None else "the folder does not exist"
        raise CatVersionError(
            f"{path}: not found ({state}). A Hugging Face model folder has its configuration "
            "there; check the path, or download the model again."
        )
    remedy = "Download the model's configuration again."
    if not path.is_file():
        raise CatVersionError(f"{path}: is not a regular file. {remedy}")
    try:
        # with Infinity, which diffusers writes into configurations of schedulers
        config = json.loads(
            read_text(path, max_bytes=MAX_CONFIG_BYTES), object_pairs_hook=without_repetition
        )
    except CatVersionError as error:
        reason = str(error).rstrip(".")
        raise CatVersionError(f"{reason}. {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise CatVersionError(
            f"{path}: cannot be read as JSON ({shown(error)}). {remedy}"
        ) from error
    if not isinstance(config, dict):
        raise CatVersionError(
            f"{path}: holds a {type(config).__name__}, must be a JSON object. Download it again."
        )
    return config


def check_integers(
    values: Mapping[str, Any], ranges: Mapping[str, tuple[int, int]], *, source: str
) -> None:
    """Check that each of the named values is one whole number within its range.

    Raises:
      CatVersionError: one is not; a missing one passes.
    """
    for key, (low, high) in ranges.items():
        value = values.get(key, low)
        if type(value) is not int:  # true and 1.0 are no sizes
            raise CatVersionError(
                f"{source}: {key} = {shown(value)}, must be one integer. Use such a model, or "
                "correct the file."
            )
        if not low <= value <= high:
            raise CatVersionError(
                f"{source}: {key} = {shown(value)}, must be within {low}..{high}. Use such a "
                "model, or correct the file."
            )


def check_numbers(values: Mapping[str, Any], ranges: Mapping[str, Range], *, source: str) -> None:
    """Check that each of the named values is one finite number within its range.

    Raises:
      CatVersionError: one is not; a missing one passes.
    """
    for key, (low, high) in ranges.items():
        value = values.get(key, low)
        if type(value) not in (int, float) or not low <= value <= high:  # NaN is in no range
            raise CatVersionError(
                f"{source}: {key} = {shown(value)}, must be one number within {low:g}..{high:g}. "
                "Use such a model, or correct the file."
            )


def check_supported(
    config: Mapping[str, Any],
    *,
    source: str,
    used: Container[str],
    ignored: Container[str] = (),
    only: Mapping[str, tuple[Any, ...]] | None = None,
) -> None:
    """Refuse a configuration that asks for a computation we do not have.

    Args:
      config: the parsed ``config.json``.
      source: what to call it in the message, e.g. the file's path.
      used: keys the network reads.
      ignored: keys that do not change the computation of a frozen network.
      only: keys of which just these values are supported; an absent key passes.

    Keys that start with an underscore are bookkeeping. Any other key passes only if its value is
    None, False or empty, which is how Hugging Face writes "not used".

    Raises:
      CatVersionError: one error that names every offending key.
    """
    only = only or {}
    offending = []
    for name, value in sorted(config.items()):
        if name in only:
            if not any(_same(value, allowed) for allowed in only[name]):
                allowed_text = " or ".join(json.dumps(allowed) for allowed in only[name])
                offending.append(f"{name:.80} = {_json(value)} (supported: {allowed_text})")
        elif name in used or name in ignored or name.startswith("_"):
            continue
        elif value is not None and value is not False and value not in ("", [], {}, ()):
            offending.append(f"{name:.80} = {_json(value)} (unknown key)")
    if offending:
        raise CatVersionError(
            f"{source}: this network computes something catversion_jax does not support:\n  "
            + "\n  ".join(listed(offending, _MOST_LISTED))
            + "\nUse a Stable Diffusion 1.x or 2.x model, or report the model so that it can be "
            "added."
        )


def _json(value: Any) -> str:
    """A value as the file has it, where that is short."""
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _same(value: Any, allowed: Any) -> bool:
    """Equality that tells ``true`` from ``1`` and takes a JSON list for a tuple."""
    if isinstance(allowed, tuple):
        return isinstance(value, (list, tuple)) and tuple(value) == allowed
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)
