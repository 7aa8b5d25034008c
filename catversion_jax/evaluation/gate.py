"""The quality gate of a fleet: which concepts fail, why, and after how many updates.

    {"thresholds": {"rank1": 0.5, "copies": 0.25, "text_loss": 0.05},
     "failed": {"rex": {"reasons": ["rank-1 0.25 is below 0.5"], "updates": 200}},
     "passed": ["fido"],
     "not_checked": {"rank1": ["tom"]}}

``catversion train retrain=failed`` reads it. What cannot be checked (rank without another concept
of the class, text loss without the plain model's images) lets a concept pass and is said.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from catversion_jax.config.gate import GateSettings
from catversion_jax.errors import listed
from catversion_jax.evaluation.scores import SubjectScores
from catversion_jax.runtime.atomic_files import write_atomically

CHECKS = {"rank1": "rank", "copies": "copies", "text_loss": "text loss"}


@dataclasses.dataclass(frozen=True)
class GateResult:
    """What the gate found.

    Attributes:
      settings: its thresholds.
      failed: reasons by name of the concepts that fail.
      passed: names of the others.
      not_checked: names of concepts by what could not be checked.
      updates: of each concept, as its file says; of those that have a file.
    """

    settings: GateSettings
    failed: Mapping[str, Sequence[str]]
    passed: Sequence[str]
    not_checked: Mapping[str, Sequence[str]]
    updates: Mapping[str, int]

    def as_json(self) -> dict[str, Any]:
        """The content of ``gate.json``."""
        failed: dict[str, dict[str, Any]] = {}
        for name, reasons in self.failed.items():
            failed[name] = {"reasons": list(reasons)}
            if name in self.updates:
                failed[name]["updates"] = self.updates[name]
        return {
            "thresholds": dataclasses.asdict(self.settings),
            "failed": failed,
            "passed": list(self.passed),
            "not_checked": {key: list(names) for key, names in self.not_checked.items()},
        }

    def lines(self) -> list[str]:
        """For the terminal: the count, a line for each concept that fails, what was not checked."""
        total = len(self.failed) + len(self.passed)
        lines = [f"gate: {len(self.failed)} of {total} concepts fail"]
        lines += [f"  {name}: {'; '.join(reasons)}" for name, reasons in self.failed.items()]
        for key, names in self.not_checked.items():
            lines.append(f"  {CHECKS[key]} not checked: {', '.join(listed(names))}")
        return lines


def judge(
    subjects: Sequence[SubjectScores],
    plain: Sequence[SubjectScores],
    settings: GateSettings,
    updates: Mapping[str, int],
) -> GateResult:
    """Compare every concept's scores with the thresholds.

    Args:
      subjects: scores of the method under evaluation, with ranks where there is a gallery.
      plain: scores of the plain model on the same prompts and seeds; empty where there are none.
      settings: the thresholds.
      updates: of each concept that has a file.
    """
    plain_text = {subject.name: subject.total.text_alignment_edit for subject in plain}
    failed: dict[str, list[str]] = {}
    unchecked: dict[str, list[str]] = {key: [] for key in CHECKS}
    for subject in subjects:
        total, reasons = subject.total, []
        if total.rank1 is None:
            unchecked["rank1"].append(subject.name)
        elif total.rank1 < settings.rank1:
            reasons.append(f"rank-1 {total.rank1:.2f} is below {settings.rank1:g}")
        if subject.real.copy_limit is None:
            unchecked["copies"].append(subject.name)
        elif total.copies > settings.copies * total.images:
            share = total.copies / total.images
            reasons.append(
                f"copies {share:.2f} ({total.copies} of {total.images}) are above "
                f"{settings.copies:g}"
            )
        before, now = plain_text.get(subject.name), total.text_alignment_edit
        if before is None or now is None:
            unchecked["text_loss"].append(subject.name)
        elif before - now > settings.text_loss:
            reasons.append(
                f"text loss {before - now:.3f} ({now:.3f}, plain model {before:.3f}) is above "
                f"{settings.text_loss:g}"
            )
        if reasons:
            failed[subject.name] = reasons
    return GateResult(
        settings,
        failed,
        [subject.name for subject in subjects if subject.name not in failed],
        {key: names for key, names in unchecked.items() if names},
        {name: count for name, count in updates.items() if name in failed},
    )


def write_gate(path: Path, result: GateResult) -> Path:
    """Write ``gate.json``.

    Raises:
      CatVersionError: the file cannot be written.
    """
    content = json.dumps(result.as_json(), indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, content.encode())
    return path
