"""What an evaluation prints and writes: images without a score, names a spreadsheet would run."""

import csv
import json
from pathlib import Path

from catversion_jax.evaluation.scoring import PromptScores, RealImages, Scores, SubjectScores
from catversion_jax.evaluation.tables import Evaluation, write_scores
from catversion_jax.runtime.spreadsheet_cells import plain_cell

SCORES = Scores(4, 0.5, None, -0.2, 0.1, 0.3, None, None, 0.9, 0, 1, 0)
REAL = RealImages(0.95, 0.97, None, 0.99, 2, 2, 0)


def evaluation(name: str, prompt: str, ignored: tuple[str, ...]) -> Evaluation:
    prompts = (PromptScores(prompt, "", SCORES, Path("x.png")),)
    subject = SubjectScores(name, "=dog", SCORES, SCORES, prompts, REAL, (0,), ignored)
    return Evaluation({}, {"ours": [subject]}, {}, {})


def test_unscored_images_are_listed_on_the_terminal() -> None:
    names = tuple(f"holiday {i}.png" for i in range(12))
    lines = str(evaluation("rex", "a dog", names)).splitlines()
    (line,) = [line for line in lines if "not scored" in line]
    assert line.startswith("ours, rex: 12 images not scored, as they show no prompt of the set: ")
    assert "holiday 0.png, holiday 1.png" in line
    assert line.endswith(" ...")
    assert "not scored" not in str(evaluation("rex", "a dog", ()))


def test_no_cell_of_the_scores_is_run_and_numbers_stay_numbers(tmp_path: Path) -> None:
    name, prompt = '=HYPERLINK("http://x")', "+1 dog"
    table, content = write_scores(tmp_path, evaluation(name, prompt, ()))
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    texts = ("method", "concept", "base_class", "prompt", "edit")
    assert not any(row[key].startswith(("=", "+", "-", "@")) for row in rows for key in texts)
    assert (plain_cell(rows[0]["concept"]), plain_cell(rows[0]["prompt"])) == (name, prompt)
    assert float(rows[0]["text_alignment_edit"]) == -0.2
    assert json.loads(content.read_text())["methods"]["ours"]["concepts"][0]["name"] == name
