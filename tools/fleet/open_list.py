"""How long a list of very many concepts takes to open: ``python tools/fleet/open_list.py WORK``.

Writes a CSV of ``--rows`` concepts (a million; the package's six example folders, renamed),
opens it as training and ``catversion check`` do, and reads the first hundred concepts.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import catversion_jax
from catversion_jax.concepts.long_lists import open_long_list

EXAMPLES = Path(catversion_jax.__file__).parent / "assets" / "tiny-sd-examples"
READ = 100


def main() -> None:
    """Write, open and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    file = args.work / f"{args.rows}.csv"
    folders = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())
    with file.open("w") as lines:
        lines.write("name,path,base_class\n")
        for number in range(args.rows):
            folder = folders[number % len(folders)]
            lines.write(f"concept_{number:07d},{folder},{folder.name.rpartition('_')[2]}\n")
    started, busy = time.perf_counter(), time.process_time()
    long_list = open_long_list(file)
    found = {
        "rows": args.rows,
        "MB of the file": file.stat().st_size // 2**20,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds of the processor": round(time.process_time() - busy, 1),
        "peak MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if long_list is None:
        raise SystemExit(f"--rows {args.rows}: is no long list.")
    busy = time.process_time()
    for name in long_list.names[:READ]:
        long_list.read(name)
    found["ms of the processor to read a concept"] = round(
        1e3 * (time.process_time() - busy) / READ, 2
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
