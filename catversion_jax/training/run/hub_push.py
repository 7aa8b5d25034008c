"""From a run, or one concept, to a repository of the Hugging Face hub: the concept files, the
pictures of their newest samples, their final losses and the model card. No photo is sent.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path

from catversion_jax.errors import CatVersionError, listed, shown
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, load_concept
from catversion_jax.models.weights.hub_concept import check_repo_id
from catversion_jax.runtime.bucket_paths import as_path
from catversion_jax.runtime.concept_packs import SUFFIX, split_packed
from catversion_jax.runtime.regular_files import read_text
from catversion_jax.training.run import names
from catversion_jax.training.run.model_card import (
    CARD_FILE,
    LISTED,
    MARK,
    PLACEHOLDER,
    CardConcept,
    card_text,
    picture_files,
)
from catversion_jax.training.run.reader import note_oddities
from catversion_jax.training.run.shards import run_roots


@dataclasses.dataclass(frozen=True)
class Push:
    """What goes to a repository.

    Attributes:
      repo_id: ``USER/NAME``.
      files: content by path in the repository.
      damaged: why concepts are left out, by the name of their folder.
    """

    repo_id: str
    files: Mapping[str, bytes]
    damaged: Mapping[str, str]

    def send(self, *, private: bool = False) -> str:
        """Make the repository, where there is none, and send the files; its address.

        Raises:
          CatVersionError: the hub refuses it or cannot be reached.
        """
        import huggingface_hub

        api = huggingface_hub.HfApi()
        try:
            address = api.create_repo(self.repo_id, private=private, exist_ok=True)
            with tempfile.TemporaryDirectory() as folder:
                for path, content in self.files.items():
                    file = Path(folder, path)
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(content)
                api.upload_folder(
                    repo_id=self.repo_id,
                    folder_path=folder,
                    commit_message="CatVersion concepts",
                )
        except Exception as error:  # the hub's, and its HTTP client's, differ by version
            status = getattr(getattr(error, "response", None), "status_code", None)
            remedy = (
                "Log in with 'hf auth login' and a token that may write there"
                if status in (401, 403)
                else "Check the connection (HF_HUB_OFFLINE too) and run the same command again"
            )
            raise CatVersionError(
                f"{self.repo_id}: cannot be pushed ({shown(error)}). {remedy}."
            ) from error
        return str(address)


def plan_push(source: str | Path, repo_id: str, license_id: str | None = None) -> Push:
    """What :meth:`Push.send` would send of a run, a concept's folder or a concept file.

    Args:
      source: which.
      repo_id: where it goes.
      license_id: as the hub calls it; None takes that of the published model.

    Raises:
      CatVersionError: there is no concept that can be read, or ``repo_id`` cannot be one.
    """
    check_repo_id(repo_id)
    root = as_path(source)
    pack = (split_packed(root) or (str(root), ""))[0]
    if pack.endswith(SUFFIX) and Path(pack).is_file():
        raise CatVersionError(
            f"{root}: is a pack of concepts, or one of it. Write files first, `catversion export "
            f"{pack} --concept NAME`, and push one of them."
        )
    concepts, damaged = [], {}
    for file in _concept_files(root):
        try:
            concepts.append(CardConcept(file, load_concept(file)))
        except CatVersionError as error:
            damaged[file.parent.name] = str(error)
    if not concepts:
        raise CatVersionError(
            next(iter(damaged.values()), "")
            or f"{root}: no finished concept in it. Give the output_dir of a run, a concept's "
            "folder or a concept file."
        )
    models = sorted({one.concept.base_model for one in concepts})
    if len(models) > 1:
        raise CatVersionError(
            f"{root}: its concepts were trained on {len(models)} models "
            f"({', '.join(listed(models))}), and a model card names one. Push those of "
            "each model to a repository of their own."
        )
    files: dict[str, bytes] = {}
    for one in concepts:
        if one.name == CARD_FILE:
            raise CatVersionError(
                f"{one.folder}: a concept called {CARD_FILE} would take the model card's place. "
                "Rename its folder."
            )
        if f"{one.name}/{CONCEPT_FILE_NAME}" in files:
            raise CatVersionError(f"{root}: two concepts are called {one.name!r}. Rename a folder.")
        files[f"{one.name}/{CONCEPT_FILE_NAME}"] = one.file.read_bytes()
        files |= {path: picture for path, (_, picture) in picture_files(one).items()}
        if (one.folder / names.SUMMARY_FILE).is_file():
            files[f"{one.name}/{names.SUMMARY_FILE}"] = (
                one.folder / names.SUMMARY_FILE
            ).read_bytes()
    own = read_text(root / CARD_FILE) if root.is_dir() else None
    is_yours = own is not None and MARK not in own
    if is_yours and license_id:
        raise CatVersionError(
            f"--license {license_id}: {root / CARD_FILE} is your own and is pushed as it is. Write "
            f"`license: {license_id}` between its first two lines `---`, and leave --license out."
        )
    if own is None or not is_yours:
        title = repo_id.split("/")[1]
        own = card_text(concepts[:LISTED], len(concepts), title, license_id)
    files[CARD_FILE] = own.replace(PLACEHOLDER, repo_id).encode()
    return Push(repo_id, files, damaged)


def _concept_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if (root / CONCEPT_FILE_NAME).is_file():
        return [root / CONCEPT_FILE_NAME]
    folders = [one / names.CONCEPTS_FOLDER for one in run_roots(root)]  # of each shard, or its own
    found = [folder for folder in folders if folder.is_dir()] or [root]
    files = [file for folder in found for file in folder.glob(f"*/{CONCEPT_FILE_NAME}")]
    note_oddities(root, files)
    return sorted(files, key=lambda file: file.parent.name)
