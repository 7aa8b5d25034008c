"""What a release is made of says one version, and the forms are forms."""

import re
from pathlib import Path

import yaml

import catversion_jax

ROOT = Path(__file__).resolve().parents[1]


def test_changelog_and_citation_name_the_version_of_the_package() -> None:
    versions = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert versions[0] == citation["version"] == catversion_jax.__version__
    assert "2311.14631" in citation["preferred-citation"]["url"]


def test_issue_forms_ask_for_what_the_commands_print() -> None:
    asked = {}
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text())
        if "body" not in form:
            continue  # config.yml
        assert form["name"]
        assert form["description"]
        fields = [field for field in form["body"] if field["type"] != "markdown"]
        ids = [field["id"] for field in fields]
        assert len(set(ids)) == len(ids) > 0
        asked[path.stem] = " ".join(field["attributes"]["label"] for field in fields)
    for name in ("bug", "bad_images"):
        for command in ("--version", "status", "inspect"):
            assert f"catversion {command}" in asked[name]


def test_the_shipped_configs_are_those_of_the_repository() -> None:
    """One file, reached twice: a wheel takes what the link leads to."""
    link = ROOT / "catversion_jax" / "assets" / "configs"
    assert link.resolve() == ROOT / "configs"
