"""The output folder of a run: where each thing lies, what is done, and why a concept failed.

out/
  run.json  config.resolved.yaml  index.csv  metrics.jsonl  logs/<concept>/
      checkpoints/pack-0000/<step>/
  concepts/<name>/  catversion.safetensors  catversion-000250.safetensors  metrics.csv  metrics.json
                    samples/000250.png  FAILED.txt (only when quarantined)
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from catversion_jax import __version__
from catversion_jax.atomic_files import make_folder, write_atomically
from catversion_jax.config import TrainConfig, dump_config, learning_options
from catversion_jax.errors import CatVersionError
from catversion_jax.export import CONCEPT_FILE_NAME, Concept, load_concept
from catversion_jax.training.checkpoint import differences

logger = logging.getLogger(__name__)

FAILED_NAME, SUMMARY_NAME = "FAILED.txt", "metrics.json"
INDEX_COLUMNS = ("name", "state", "eval_loss", "plain_eval_loss", "file", "reason")


class RunDirectory:
    """Paths and small state files of one run."""

    def __init__(self, config: TrainConfig):
        self.root = Path(config.output_dir)
        self.config = config
        self.checkpoints = self.root / "checkpoints"
        self.jsonl = self.root / "metrics.jsonl"
        self.logs = self.root / "logs"

    def concept(self, name: str) -> Path:
        """Folder of one concept."""
        return self.root / "concepts" / name

    def concept_file(self, name: str, step: int | None = None) -> Path:
        """The final concept file, or the one of an intermediate step."""
        stem, suffix = CONCEPT_FILE_NAME.rsplit(".", 1)
        return self.concept(name) / (
            CONCEPT_FILE_NAME if step is None else f"{stem}-{step:06d}.{suffix}"
        )

    def open(self, base_model: str, text_encoder_sha256: str) -> None:
        """Create the folder, or check that the run in it is this one.

        Raises:
          CatVersionError: unwritable; holds a run that learned with other options; holds results
            and ``resume_from_checkpoint`` is none.
        """
        make_folder(self.root)
        settings = {
            "base_model": base_model,
            "text_encoder_sha256": text_encoder_sha256,
            "options": learning_options(self.config),
        }
        manifest = self.root / "run.json"
        if manifest.exists() and self._holds_results():
            self._check_same_run(manifest, settings)
        content = {"catversion_jax": __version__, **settings}
        write_atomically(manifest, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
        write_atomically(self.root / "config.resolved.yaml", dump_config(self.config).encode())

    def _holds_results(self) -> bool:
        """Whether anything was learned here: a mistyped first attempt leaves the folder free."""
        patterns = (f"concepts/*/{CONCEPT_FILE_NAME}", "checkpoints/pack-*/[0-9]*")
        return any(next(self.root.glob(pattern), None) is not None for pattern in patterns)

    def final(self, name: str) -> Concept:
        """The finished concept."""
        return load_concept(self.concept_file(name))

    def is_done(self, name: str) -> bool:
        """Whether the final file of a concept is there, and whole."""
        if not self.concept_file(name).exists():
            return False
        try:
            return self.final(name).step == self.config.max_train_steps
        except CatVersionError as error:
            logger.warning("%s; training it again", error)
            return False

    def has_failed(self, name: str) -> bool:
        """Whether the concept was quarantined."""
        return (self.concept(name) / FAILED_NAME).exists()

    def quarantine(self, name: str, reason: str) -> None:
        """Say in the concept's folder why it was given up; nothing else of it is touched."""
        make_folder(self.concept(name))
        text = (
            f"{reason}\n\nThe other concepts of the run went on. Correct the images or words and "
            "run the same command again; other options need another output_dir.\n"
        )
        write_atomically(self.concept(name) / FAILED_NAME, text.encode())

    def clear_failure(self, name: str) -> None:
        """Forget an earlier quarantine: the concept is tried again."""
        (self.concept(name) / FAILED_NAME).unlink(missing_ok=True)

    def write_summary(self, name: str, summary: Mapping[str, float]) -> None:
        """The concept's final evaluation losses, for people and for ``index.csv``."""
        text = json.dumps(summary, indent=1) + "\n"
        write_atomically(self.concept(name) / SUMMARY_NAME, text.encode())

    def write_index(self, names: Iterable[str], failures: Mapping[str, str]) -> None:
        """One line per concept: done (with its losses), failed (with the reason) or pending."""
        text = io.StringIO()
        writer = csv.DictWriter(text, INDEX_COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        for name in names:
            if name in failures:
                reason = failures[name].splitlines()[0]
                writer.writerow({"name": name, "state": "failed", "reason": reason})
            elif self.concept_file(name).exists():
                file = self.concept_file(name).relative_to(self.root)
                summary = self.concept(name) / SUMMARY_NAME
                losses = json.loads(summary.read_text()) if summary.exists() else {}
                writer.writerow({"name": name, "state": "done", "file": file, **losses})
            else:
                writer.writerow({"name": name, "state": "pending"})
        write_atomically(self.root / "index.csv", text.getvalue().encode())

    def _check_same_run(self, manifest: Path, settings: Mapping[str, Any]) -> None:
        if self.config.resume_from_checkpoint == "none":
            raise CatVersionError(
                f"output_dir={self.root}: already holds a run and resume_from_checkpoint=none "
                "would overwrite it. Give another output_dir, or leave "
                "resume_from_checkpoint=latest to continue."
            )
        try:
            old = json.loads(manifest.read_text(encoding="utf-8"))
            before = {
                **old["options"],
                "base model": old["base_model"],
                "weights": old["text_encoder_sha256"],
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CatVersionError(
                f"{manifest}: is not readable as a run ({error}). Give another output_dir."
            ) from None
        now = {
            **settings["options"],
            "base model": settings["base_model"],
            "weights": settings["text_encoder_sha256"],
        }
        changed = differences(before, now)
        if changed:
            raise CatVersionError(
                f"output_dir={self.root}: holds a run that learned with other options "
                f"({'; '.join(changed)}). Continue it with its own options (config.resolved.yaml) "
                "or give another output_dir."
            )
