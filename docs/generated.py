"""The parts of the reference that are written by the code they describe.

A page says ``<!-- generated: options -->`` where they belong; ``conf.py`` calls :func:`fill_in`
while the site is built. Pages that explain, and are read on GitHub too, write an option as code,
such as `learning_rate`; here it becomes a link to the reference.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

from catversion_jax.cli import COMMANDS
from catversion_jax.config.presets import PRESETS
from catversion_jax.config.reading import OptionRow, option_table

_DECIDES = {
    True: "decides the result",
    False: "does not change the result",
    "with early_stop": "decides the result where `early_stop` is on",
}


def fill_in(app: object, page: str, source: list[str]) -> None:
    """Sphinx's event ``source-read``: replace the marks in a page's text."""
    for name, write in WRITERS.items():
        mark = f"<!-- generated: {name} -->"
        if mark in source[0]:
            source[0] = source[0].replace(mark, write())
    if page.startswith(("how_to/", "explanation/", "tutorial")):
        names = "|".join(row.name for row in option_table())
        source[0] = re.sub(rf"(?<!`)`({names})`(?!`)", r"{confval}`\1`", source[0])


def options() -> str:
    """Every training option, group by group."""
    groups = itertools.groupby(option_table(), key=lambda row: row.group)
    return "\n\n".join(_group(heading, rows) for heading, rows in groups)


def _group(heading: str, rows: Iterator[OptionRow]) -> str:
    return "\n\n".join([f"## {heading}", *map(_option, rows)])


def _option(row: OptionRow) -> str:
    facts = [f"{row.type}, {row.range}" if row.range else row.type]
    if row.default:
        facts.append(f"default `{row.default}`")
    facts.append(_DECIDES[row.decides_result])
    if row.aliases:
        facts.append(f"also called {', '.join(f'`{alias}`' for alias in row.aliases)}")
    described = f"{{.facts}}\n{' · '.join(facts)}\n\n{_prose(row.help)}"
    return f"```{{confval}} {row.name}\n\n{described}\n```"


def presets() -> str:
    """A table of what each preset sets."""
    names = [name for name, values in PRESETS.items() if values]
    keys = dict.fromkeys(key for name in names for key in PRESETS[name])
    lines = [["option", *(f"`{name}`" for name in names)], ["---"] * (len(names) + 1)]
    for key in keys:
        cells = (str(PRESETS[name].get(key, "")) for name in names)
        lines.append([f"{{confval}}`{key}`", *(f"`{cell}`" if cell else "" for cell in cells)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def commands() -> str:
    """Every command with its arguments."""
    return "\n\n".join(_command(name) for name in COMMANDS)


def _command(name: str) -> str:
    module, summary = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"catversion {name}", description=summary)
    importlib.import_module(f"catversion_jax.cli.{module}").add_arguments(parser)
    usage = parser.format_usage().removeprefix("usage: ").strip()
    parts = [
        f"## catversion {name}",
        f"{summary[0].upper()}{summary[1:]}.",
        f"```text\n{usage}\n```",
    ]
    if name == "train":
        parts.append(
            "Every option of the [reference](options.md) may follow, as `key=value` or as "
            "`--key value`."
        )
    if parser.epilog and name != "train":
        parts.append(_prose(" ".join(parser.epilog.split())))
    options = {row.name for row in option_table()} if name == "train" else set()
    rows = [
        (_invocation(action), _meaning(action, parser))
        for action in parser._actions
        if action.dest not in options and action.dest != "help"
    ]
    if rows:
        lines = ["| argument | meaning |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _invocation(action: argparse.Action) -> str:
    """The argument as it is typed."""
    if not action.option_strings:
        metavar = action.metavar or action.dest
        return _code(metavar) + (" ..." if action.nargs in ("*", "+") else "")
    names = ", ".join(map(_code, action.option_strings))
    if action.nargs == 0:
        return names
    if action.choices:
        return f"{names} " + " \\| ".join(map(_code, action.choices))
    return f"{names} {_code(action.metavar or action.dest.upper())}"


def _meaning(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    text = (action.help or "") % {**vars(action), "prog": parser.prog}
    if action.required and action.option_strings:
        text += " (required)"
    return _prose(text)


def _code(text: object) -> str:
    """Code in a cell of a table."""
    return "`" + str(text).replace("|", "\\|") + "`"


def _prose(text: str) -> str:
    """A help text as Markdown, also in a cell: what stands in backticks is code, the rest words."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_<>|\[\]])", r"\\\1", part) for part in parts[::2]]
    parts[1::2] = [part.replace("|", "\\|") for part in parts[1::2]]
    return "`".join(parts)


def models() -> str:
    """The table of ``tests/model_families.py``: which family can do what, and its tests."""
    found = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "model_families.py"))
    tests: dict[str, int] = {}
    lines = [["family", *found["QUESTIONS"]], ["---"] * (len(found["QUESTIONS"]) + 1)]
    for family, cells in found["FAMILIES"].items():
        lines.append([family, *(_cell(cell, tests) for cell in cells)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    notes = "\n".join(f"{number}. `tests/{test}`" for test, number in tests.items())
    return f"{table}\n\nThe tests:\n\n{notes}"


def _cell(cell: str, tests: dict[str, int]) -> str:
    """Yes or no with the number of the test, another family, or that nobody tested it."""
    if "::" not in cell:
        return cell
    test = cell.removeprefix("no: ")
    answer = "no" if cell.startswith("no: ") else "yes"
    return f"{answer} ({tests.setdefault(test, len(tests) + 1)})"


WRITERS = {"models": models, "options": options, "presets": presets, "commands": commands}
