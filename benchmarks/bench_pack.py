"""What it costs to open a pack of very many concepts and to read one of them.

    python benchmarks/bench_pack.py OUT.arrow [--rows 200000]

Writes the pack where it is not there yet (each row a file of Stable Diffusion 1.5's size, under a
name of its own), then opens it in a process of its own, once with the file out of the page cache
and once with what it reads in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

READ = """
import json, os, random, sys, time

def megabytes(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 1024

import pyarrow.ipc  # its import is paid once, whatever is opened
from catversion_jax.runtime.concept_packs import ConceptPack, read_packed

path, rows = sys.argv[1], int(sys.argv[2])
before = megabytes("RssAnon"), megabytes("VmRSS")
began = time.perf_counter()
pack = ConceptPack(path)
opened = time.perf_counter()
moments = random.Random(0)
first = pack[f"concept-{moments.randrange(rows):07d}"]
read = time.perf_counter()
for _ in range(1000):
    pack[f"concept-{moments.randrange(rows):07d}"]
more = time.perf_counter()
after = megabytes("RssAnon"), megabytes("VmRSS")
one = time.perf_counter()
read_packed(f"{path}#concept-{moments.randrange(rows):07d}")
print(json.dumps({
    "opening_ms": 1000 * (opened - began), "first_concept_ms": 1000 * (read - opened),
    "each_of_1000_more_ms": more - read,
    "opening_and_one_concept_ms": 1000 * (time.perf_counter() - one),
    "memory_mb": after[0] - before[0], "with_mapped_pages_mb": after[1] - before[1],
    "bytes_of_a_concept": len(first),
}))
"""


def main() -> None:
    """Write the pack, and print what reading it costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("pack", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    args = parser.parse_args()
    found = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": args.rows}
    if not args.pack.exists():
        began = time.perf_counter()
        write(args.pack, args.rows)
        found["writing_seconds"] = round(time.perf_counter() - began, 1)
    found["gigabytes"] = round(args.pack.stat().st_size / 1e9, 3)
    with args.pack.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for when in ("cold", "warm"):
        command = [sys.executable, "-c", READ, str(args.pack), str(args.rows)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[when] = {key: round(value, 2) for key, value in json.loads(text).items()}
    print(json.dumps(found, indent=1))


def write(path: Path, rows: int) -> None:
    """The same learned numbers under many names."""
    import numpy as np

    from catversion_jax import load_concept, save_concept
    from catversion_jax.methods.residual import KVResidual
    from catversion_jax.training.run.packing import write_rows

    key, value = np.random.default_rng(0).standard_normal((2, 3, 1, 12, 64)).astype(np.float32)
    file = path.with_suffix(".safetensors")
    learned = KVResidual(key, value, layers=(9, 10, 11))
    save_concept(file, learned, base_class="teapot", name="x", base_model="sd15", step=1000)
    concept, data = load_concept(file), file.read_bytes()
    file.unlink()

    def all_rows() -> Iterator[tuple]:
        for number in range(rows):
            yield dataclasses.replace(concept, name=f"concept-{number:07d}"), data

    write_rows(path, all_rows())


if __name__ == "__main__":
    main()
