"""Arms of several training seeds in one table: ``python tools/study/over_seeds.py OUT OUT2 ...``.

Each OUT is one that ``run.py`` filled with another ``--training_seed``. A concept's figure is the
mean over them, so intervals stay those over concepts; arms that an OUT lacks are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import Figures, concept_figures, means, paired
from strips import write_strips

from catversion_jax.evaluation.intervals import Interval

SHOWN = ("image_alignment_masked", "text_alignment_edit", "overall_masked", "copied")


def averaged(outs: Sequence[Path], images: str) -> dict[str, dict[str, Figures]]:
    """Every arm's figures by concept, of the arms and concepts that all OUTs have."""
    tables = []
    for out in outs:
        paths = sorted(out.glob("arms/*/scores.json"))
        contents = {path.parent.name: json.loads(path.read_text()) for path in paths}
        tables.append({arm: content["concepts"] for arm, content in contents.items()})
    found: dict[str, dict[str, Figures]] = {}
    for arm in tables[0]:
        if all(arm in table for table in tables):
            names = [n for n in tables[0][arm] if all(n in table[arm] for table in tables)]
            found[arm] = {
                n: _mean([concept_figures(t[arm][n], images) for t in tables]) for n in names
            }
    return found


def _mean(figures: Sequence[Mapping[str, Any]]) -> Figures:
    return {
        metric: None
        if any(one[metric] is None for one in figures)
        else sum(one[metric] for one in figures) / len(figures)
        for metric in figures[0]
    }


def main(argv: Sequence[str]) -> int:
    """Print two Markdown tables: means, and differences to one arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("outs", nargs="+", type=Path, metavar="OUT")
    parser.add_argument("--against", default="catversion", help="arm to compare with [catversion]")
    parser.add_argument("--images", choices=("total", "first_seed"), default="total")
    parser.add_argument("--strips", type=Path, metavar="FOLDER", help="receives pictures")
    parser.add_argument("--count", type=int, default=3, help="concepts in pictures [3]")
    args = parser.parse_args(argv)
    table = averaged(args.outs, args.images)
    for title, other in (("arm", None), (f"minus {args.against}", args.against)):
        print(
            f"| {title} | {' | '.join(SHOWN)} | concepts |\n| --- |{' ---: |' * (len(SHOWN) + 1)}"
        )
        for arm, concepts in table.items():
            if arm == other or (other and other not in table):
                continue
            found = means(concepts) if other is None else paired(concepts, table[other])
            cells = [cell(found.get(metric), sign=other is not None) for metric in SHOWN]
            print(f"| {arm} | {' | '.join(cells)} | {len(concepts)} |")
        print()
    if args.strips:
        args.strips.mkdir(parents=True, exist_ok=True)
        write_strips(args.outs[0], args.strips, table, args.count, prefix="quality")
    return 0


def cell(value: Interval | None, *, sign: bool) -> str:
    """Mean and interval, or nothing."""
    if value is None:
        return ""
    form = "+.3f" if sign else ".3f"
    return f"{value.mean:{form}} [{value.low:{form}}, {value.high:{form}}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
