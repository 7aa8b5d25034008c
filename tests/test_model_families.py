"""The table of docs/models.md names tests that CI runs."""

import ast
from pathlib import Path

import pytest
from model_families import FAMILIES, QUESTIONS

TESTS = Path(__file__).parent
CELLS = [(family, cell) for family, cells in FAMILIES.items() for cell in cells]


def run_by_ci(test: str) -> bool:
    """Whether there is such a function, without ``slow`` or ``skip`` on it or on its file."""
    file, name = test.split("::")
    tree = ast.parse((TESTS / file).read_text())
    marks = [node for node in tree.body if isinstance(node, ast.Assign)]
    if any("pytestmark" in ast.unparse(mark) for mark in marks):
        return False
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            decorators = " ".join(map(ast.unparse, node.decorator_list))
            return "mark.slow" not in decorators and "mark.skip" not in decorators
    return False


@pytest.mark.parametrize(("family", "cell"), CELLS)
def test_every_answer_is_a_test_or_another_family(family, cell):
    if cell.startswith("as "):
        assert any(cell.removeprefix("as ").split(" and ")[0] in other for other in FAMILIES)
        assert family != cell
    else:
        assert run_by_ci(cell.removeprefix("no: "))


def test_every_family_answers_every_question():
    assert {len(cells) for cells in FAMILIES.values()} == {len(QUESTIONS)}
    # each answers at least one question by a test of its own
    assert all(any("::" in cell for cell in cells) for cells in FAMILIES.values())


def test_what_is_not_run_is_noticed():
    assert not run_by_ci("test_unet.py::test_a_transformer_computed_again_in_slices_is_the_same")
    assert not run_by_ci("test_unet.py::test_of_tomorrow")
