"""All concepts of a run as one pack (:mod:`~catversion_jax.runtime.concept_packs`)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from catversion_jax.errors import CatVersionError
from catversion_jax.methods.concept_file import CONCEPT_FILE_NAME, Concept, load_concept
from catversion_jax.runtime.atomic_files import replaced_when_done
from catversion_jax.runtime.bucket_paths import is_in_bucket
from catversion_jax.runtime.concept_packs import FILE_COLUMN, NAME_COLUMN, SUFFIX
from catversion_jax.training.run import names
from catversion_jax.training.run.reader import note_oddities
from catversion_jax.training.run.shards import run_roots

_BATCH_BYTES = 64 * 2**20
_MOST_ROWS = 4000
"""Rows of a record batch, fewer where concepts are large: a reader looks at the head of each batch
when it opens the file, a writer holds one in memory.
"""


def write_pack(
    root: Path, out: Path, on_concept: Callable[[int, int], None] | None = None
) -> tuple[int, dict[str, str]]:
    """Write every finished concept of a run, byte for byte as its file is.

    Args:
      root: ``output_dir`` of the run, divided into shards or not.
      out: the pack, ``*.arrow``; it appears when it is complete.
      on_concept: is told how many concepts are done and how many there are.

    Returns:
      The number of concepts, and why others were left out, by name.

    Raises:
      CatVersionError: the run has no concept that can be read, two have one name, or ``out`` cannot
        be written.
    """
    if is_in_bucket(out) or out.suffix != SUFFIX:
        raise CatVersionError(
            f"--out {out}: must be a file of this machine whose name ends in {SUFFIX}, such as "
            f"concepts{SUFFIX}."
        )
    files = _sorted_files(root)
    note_oddities(root, files)
    left_out: dict[str, str] = {}

    def rows() -> Iterator[tuple[Concept, bytes]]:
        for number, file in enumerate(files, 1):
            name = file.parent.name
            try:
                concept = load_concept(file)
                if concept.name != name:
                    raise CatVersionError(
                        f"{file}: calls itself {concept.name!r}, its folder {name!r}. Rename the "
                        "folder."
                    )
                yield concept, file.read_bytes()
            except CatVersionError as error:
                left_out[name] = str(error)
            if on_concept is not None:
                on_concept(number, len(files))
        if len(left_out) == len(files):
            raise CatVersionError(next(iter(left_out.values())))

    return write_rows(out, rows()), left_out


def write_rows(out: Path, rows: Iterator[tuple[Concept, bytes]]) -> int:
    """Write one or more concepts and their files, sorted by the UTF-8 bytes of their names.

    Returns:
      How many there were.
    """
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            NAME_COLUMN: Value("string"),
            "base_class": Value("string"),
            "base_model": Value("string"),
            "step": Value("int64"),
            FILE_COLUMN: Value("binary"),
        }
    )
    first = next(rows)
    at_once = min(_MOST_ROWS, max(1, _BATCH_BYTES // len(first[1])))
    with replaced_when_done(out) as path:
        writer = ArrowWriter(path=str(path), features=features, writer_batch_size=at_once)
        for concept, data in itertools.chain([first], rows):
            row = {
                NAME_COLUMN: concept.name,
                "base_class": concept.base_class,
                "base_model": concept.base_model,
                "step": concept.step,
                FILE_COLUMN: data,
            }
            writer.write(row)
        count, _ = writer.finalize()
    return int(count)


def _sorted_files(root: Path) -> Sequence[Path]:
    pattern = f"{names.CONCEPTS_FOLDER}/*/{CONCEPT_FILE_NAME}"
    files = [file for folder in run_roots(root) for file in folder.glob(pattern)]
    if not files:
        raise CatVersionError(
            f"{root}: has no finished concept (looked for {pattern}, also in its "
            f"{names.SHARDS_FOLDER}/). Give the output_dir of a run."
        )
    files.sort(key=lambda file: file.parent.name.encode("utf-8", "surrogatepass"))
    for one, other in itertools.pairwise(files):
        if one.parent.name == other.parent.name:
            raise CatVersionError(
                f"{one.parent.name}: lies both in {one.parent} and in {other.parent}. Remove one "
                "of them."
            )
    return files
