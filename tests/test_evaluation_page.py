"""The report in headless Chromium: clicked through, no console message, no request to anywhere."""

import json
import subprocess

import numpy as np
import pytest
from browsers import CHROMIUM, start_browser
from PIL import Image

from catversion_jax.concepts import ImageSource
from catversion_jax.evaluation.charts import line_chart
from catversion_jax.evaluation.image_folders import mask_path
from catversion_jax.evaluation.page import PageMaterial, write_evaluation_page
from catversion_jax.evaluation.prior import PriorScores
from catversion_jax.evaluation.scoring import PromptScores, RealImages, Scores, SubjectScores
from catversion_jax.evaluation.subjects import Subject, read_references
from catversion_jax.evaluation.tables import Evaluation

EVIL = "<script>document.title='owned'</script> & \"a dog\" <img src=http://example.com/x.png>"


def scores(image, copies=0):
    return Scores(4, image, None, 0.2, 0.1, 0.3, None, None, image, copies, 1, 0)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two concepts with names and prompts that would break a page that trusts them."""
    folder = tmp_path_factory.mktemp("page")
    shown = folder / "image.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(shown)
    disc = np.zeros((200, 200), np.uint8)
    disc[50:150, 50:150] = 255
    Image.fromarray(disc).save(mask_path(shown))
    subjects, references = [], {}
    for name, image in (("b'or\" & co", 0.7), ("aye", 0.9), ("zed", 0.8)):
        source = ImageSource("image.png", shown, mask=mask_path(shown))
        references[name] = read_references(Subject(name, "dog", (source,) * 2), None, 0)
        prompts = (PromptScores(EVIL, "", scores(image), shown),)
        real = RealImages(0.95, 0.97, None, 0.99, 2, 2, 0)
        total = scores(image, copies=int(name == "aye"))
        subjects.append(SubjectScores(name, "dog", total, total, prompts, real, (0,), ("odd.png",)))
    evaluation = Evaluation(
        {"model": EVIL},
        {"CatVersion": subjects, "plain model": subjects},
        {"aye": PriorScores(2, 0.01, 1.0, 1.0, True, None)},
        {"aye": [(10, scores(0.5)), (20, scores(0.9))]},
    )
    losses = {"aye": {"concept": [(0, 0.5), (10, 0.4)]}}
    material = PageMaterial(references, np.array([0.48, 0.45, 0.4]), losses)
    return write_evaluation_page(folder / "report.html", evaluation, material)


def test_the_file_is_alone(page):
    text = page.read_text()
    assert "<script>document" not in text
    assert "<img src=http" not in text
    assert text.count("data:image/jpeg") == 3 * (2 + 2 + 1 + 1 + 1)
    assert 'src="http' not in text


@pytest.fixture(scope="module")
def browser():
    driver = start_browser()
    yield driver
    driver.quit()


def test_clicked_through(page, browser):
    browser.get(page.as_uri())
    assert browser.title == "Evaluation: 3 concepts"

    def column(number):
        cells = browser.find_elements("css selector", f"table tbody td:nth-child({number})")
        return [cell.text for cell in cells[:3]]

    headers = browser.find_elements("css selector", "table.sortable th button")
    by_text = {button.text: button for button in reversed(headers)}
    assert column(3) == ["0.7000", "0.9000", "0.8000"]
    by_text["image"].click()
    assert column(3) == ["0.9000", "0.8000", "0.7000"]
    by_text["image"].click()
    assert column(3) == ["0.7000", "0.8000", "0.9000"]
    by_text["concept"].click()
    by_text["concept"].click()
    assert column(1) == ["aye", "b'or\" & co", "zed"]
    by_text["copies"].click()
    assert column(1)[0] == "aye"

    details = browser.find_elements("css selector", "details.concept")
    opened = [element.get_attribute("open") is not None for element in details]
    assert opened == [True, False, False]
    browser.find_element("link text", "zed").click()
    assert details[2].get_attribute("open") is not None
    details[1].find_element("css selector", "summary").click()
    assert len(details[1].find_elements("css selector", "svg polyline")) >= 2
    assert EVIL in details[1].text
    broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).length"
    assert browser.execute_script(broken) == 0
    assert browser.execute_script("return document.title") == "Evaluation: 3 concepts"

    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {
        message["params"]["request"]["url"].split(":")[0]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert asked <= {"file", "data"}


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("evil", ["", '<img src=x onerror="{}"><script>{}</script>'])
def test_no_script_but_the_page_s_own_runs(page, tmp_path, evil):
    """Its own policy refuses what a forgotten escape would let in, and nothing else."""
    evil = evil.replace("{}", "document.title='owned'")
    text = page.read_text().replace("<main>", f"<main>{evil}")
    (tmp_path / "report.html").write_text(text)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    options += ["--virtual-time-budget=2000", "--dump-dom", (tmp_path / "report.html").as_uri()]
    browser = subprocess.run(
        [CHROMIUM, *options], capture_output=True, text=True, timeout=100, check=True
    )
    assert "<title>Evaluation: 3 concepts</title>" in browser.stdout
    assert ("Content Security Policy" in browser.stderr) == bool(evil)


def test_chart_coordinates():
    chart = line_chart("loss", {"a": [(0, 1.0), (5, None), (10, 3.0)], "b": [(0, 2.0), (10, 2.0)]})
    assert chart.lines[0].points == "52.0,119.7 352.0,16.3"  # 8 % of the range is left free
    (x0, y0, text), _ = chart.lines[1].dots
    assert (x0, y0, text) == (52.0, 68.0, "b, step 0: 2.0000")
    assert [label for _, label in chart.x_ticks] == ["0", "10"]
    assert line_chart("alone", {"a": [(0, 1.0)], "b": []}) is None
