"""What decides a concept's result, and what of it may change when a run is continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from catversion_jax.concepts.class_words import plural_forms
from catversion_jax.config import OPTION_DEFAULTS
from catversion_jax.methods.concept_file import Concept, save_concept
from catversion_jax.methods.learned import Learned
from catversion_jax.training.run.identity import changed_content, same_images

FAILED_AT = "failed_at"
"""In the config of a concept that failed the quality gate and has a larger ``max_train_steps`` than
its run: the updates after which it failed.
"""

_NO_OPTION = object()


@dataclasses.dataclass(frozen=True)
class ConceptRecord:
    """What is written into a concept file beside the numbers (plain JSON values).

    Attributes:
      name: of the concept.
      base_class: the words that invoke it.
      when: the prompts it acts on, ``class_word`` or ``always``.
      base_model: name of the frozen model.
      text_encoder_sha256: fingerprint of the frozen text encoder.
      images: names of the training images.
      prompts: the training prompts.
      random_flip: probability of a mirrored image.
      seed: of its random numbers.
      config: the run's options that decide the result.
      class_forms: further forms of ``base_class`` that invoke it.
      digests: of what was trained on (:mod:`~catversion_jax.training.run.identity`), as JSON
        values; {} in files of version 0.1, which then count as unchanged.
      text_encoder_2_sha256: fingerprint of the second text encoder, '' where there is none.
    """

    name: str
    base_class: str
    when: str
    base_model: str
    text_encoder_sha256: str
    images: tuple[str, ...]
    prompts: tuple[str, ...]
    random_flip: float
    seed: int
    config: dict[str, Any]
    class_forms: tuple[str, ...] = ()
    digests: dict[str, Any] = dataclasses.field(default_factory=dict)
    text_encoder_2_sha256: str = ""

    @property
    def class_words(self) -> tuple[str, ...]:
        """All that invokes the concept: its base class, then the further forms of it."""
        return (self.base_class, *self.class_forms)

    @property
    def updates(self) -> int:
        """After how many updates it is finished."""
        return int(self.config["max_train_steps"])

    @property
    def has_larger_budget(self) -> bool:
        """Whether it failed the quality gate and gets more updates than its run."""
        return FAILED_AT in self.config

    def with_budget(self, own: Mapping[str, int]) -> ConceptRecord:
        """The record with ``max_train_steps`` and :data:`FAILED_AT` of its own."""
        return dataclasses.replace(self, config={**self.config, **own})

    def is_finished(self, concept: Concept, stopped: float | None) -> bool:
        """Whether a concept file is of the last update.

        Args:
          concept: what the file says.
          stopped: the update after which early stopping ended it, if it did.
        """
        own = concept.train_config
        if FAILED_AT in own:
            last = own.get("max_train_steps")
            return isinstance(last, int) and concept.step == last >= self.updates
        return not self.has_larger_budget and concept.step in (self.updates, stopped)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> ConceptRecord:
        """The inverse of :func:`dataclasses.asdict` after a passage through JSON."""
        fields = {"class_forms": (), "digests": {}, "text_encoder_2_sha256": "", **fields}
        lists = {name: tuple(fields[name]) for name in ("images", "prompts", "class_forms")}
        own = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        return cls(**{**own, **lists})

    def train_config(self) -> dict[str, Any]:
        """The run's options that decide the learned numbers, with the concept's own choices."""
        own = {"seed": self.seed, "prompts": list(self.prompts), "random_flip": self.random_flip}
        digests = {"digests": self.digests} if self.digests else {}
        return {**self.config, **own, **digests}

    def differences(self, concept: Concept) -> list[str]:
        """What is not as a finished concept's file says, in words."""
        stored = {"base_class": concept.base_class, "when": concept.when, "images": concept.images}
        forms = {"class_forms": self._known_forms(concept.class_forms)}
        before = {**concept.train_config, **stored, **forms}
        if FAILED_AT in before:  # its budget is its own
            before["max_train_steps"] = self.updates
        # the concept's own choice of what the run has an option for comes last
        return self._changes(before)

    def changes_since(self, earlier: ConceptRecord) -> list[str]:
        """What is not as the record in a checkpoint says, in words."""
        forms = {"class_forms": self._known_forms(earlier.class_forms)}
        return self._changes({**earlier._decisive(), **forms})

    def _known_forms(self, earlier: tuple[str, ...]) -> tuple[str, ...]:
        """``earlier`` forms to compare with; a run that knew none may go on with the plural."""
        is_default = self.class_forms == plural_forms(self.base_class)
        return self.class_forms if is_default and not earlier else earlier

    def _changes(self, before: Mapping[str, Any]) -> list[str]:
        now = self._decisive()
        digests = before.get("digests")
        same_prompts = before.get("prompts") == now["prompts"]
        content = changed_content(digests, self.digests, self.images, same_prompts=same_prompts)
        left_out = {"digests", FAILED_AT}
        if same_images(digests, self.digests):
            left_out.add("images")  # renamed at most
        before, now = (
            {key: value for key, value in one.items() if key not in left_out}
            for one in (before, now)
        )
        return [*content, *refused_changes(before, now)]

    def _decisive(self) -> dict[str, Any]:
        own = {"base_class": self.base_class, "when": self.when, "images": self.images}
        own["class_forms"] = self.class_forms
        return {**self.train_config(), **own}

    def save(self, path: Path, learned: Learned, step: int) -> None:
        """Write the concept file of this record."""
        save_concept(
            path,
            learned,
            base_class=self.base_class,
            name=self.name,
            when=self.when,
            base_model=self.base_model,
            text_encoder_sha256=self.text_encoder_sha256,
            step=step,
            config=self.train_config(),
            images=self.images,
            class_forms=self.class_forms,
            text_encoder_2_sha256=self.text_encoder_2_sha256,
        )


def refused_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Changes after which the steps done so far are no start, as ``key: before -> now``.

    A larger ``max_train_steps`` is allowed where the learning rate of the steps done so far would
    have been the same; so is an option that is newer than the run, at its default.
    """
    earlier, later = (one.get("max_train_steps") for one in (before, now))
    more_steps = (
        now.get("lr_scheduler") == "constant"
        and isinstance(earlier, int)
        and isinstance(later, int)
        and earlier < later
    )
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not (key == "max_train_steps" and more_steps)
        and not (key not in before and now[key] == OPTION_DEFAULTS.get(key, _NO_OPTION))
    ]
