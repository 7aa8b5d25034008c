"""What another judge says of arms: photos as pictures, of the right and of a wrong concept."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from catversion_jax.assets import EXAMPLE_CONCEPTS, embedded_folder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools" / "study"))

import judged


def test_gathers_over_results_and_compares(tmp_path, capsys):
    examples, concepts = embedded_folder(EXAMPLE_CONCEPTS), tmp_path / "concepts"
    names = ["dotted_teapot", "golden_turtle", "violet_owl"]
    for number, name in enumerate(names):
        shutil.copytree(examples / name, concepts / name)
        (concepts / name / "concept.json").write_text('{"base_class": "cup"}')
        for result, photo in (("one", 5), ("two", 4)):
            for arm, shown in (("right", name), ("wrong", names[number - 1])):
                folder = tmp_path / result / "arms" / arm / "images" / name
                folder.mkdir(parents=True)
                for end in (".png", ".mask.png"):
                    drawn = folder / f"a-cup-at-night_0{end}"
                    shutil.copyfile(examples / shown / f"{photo}{end}", drawn)
    results = [str(tmp_path / "one"), str(tmp_path / "two")]
    options = ["--concepts", str(concepts), "--arms", "right,wrong"]
    assert judged.main([str(tmp_path / "out"), *results, *options]) == 0
    found = sorted(file.name for file in (tmp_path / "out/right/violet_owl").glob("*.png"))
    assert [name for name in found if "mask" not in name] == [
        "a-cup-at-night_0.png",
        "a-cup-at-night_1000.png",
    ]
    rows = {
        line.split("|")[1].strip(): [float(x) for x in re.findall(r"([-+]?\d\.\d{3}) \[", line)]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ") and "[" in line
    }
    (right_judge, *right), (wrong_judge, *wrong) = rows["right"], rows["wrong"]
    assert (right, wrong[0]) == ([1.0, 1.0], 0.0)
    assert right_judge > 0.9 > wrong_judge
    difference = [right_judge - wrong_judge, 1.0, 1.0 - wrong[1]]
    assert rows["right minus wrong"] == pytest.approx(difference, abs=2e-3)
