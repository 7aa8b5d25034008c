"""The page in headless Chromium, from the photos of a shipped example to its file in diffusers:
teach, wait, draw, look, download.

With ``AXE=package/axe.min.js``, of ``npm pack axe-core``, axe looks at every page too, and what it
calls serious fails.
"""

import contextlib
import io
import os
import socket
import time
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
from browsers import start_browser
from PIL import Image
from running import start_command

from catversion_jax.assets import embedded_folder

pytest.importorskip("uvicorn", reason="the server needs pip install '.[serve]'")
pytest.importorskip("diffusers", reason="the file is for diffusers: pip install '.[torch]'")

# It loads tiny-sd, compiles the training step and the sampler, and teaches: a minute of two cores.
pytestmark = pytest.mark.slow
PHONE = (375, 760)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a server under way."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    server = start_command("serve", "--model", "tiny-sd", "--port", port, "--output_dir", folder)
    address = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/ready"):
            break
        time.sleep(0.1)
    yield address
    server.terminate()
    said, _ = server.communicate(timeout=100)
    assert server.returncode == 0, said


class Person:
    """Somebody at the browser."""

    def __init__(self, driver, address, folder):
        self.driver, self.address, self.folder, self.pictures = driver, address, folder, 0

    def goes_to(self, path):
        self.driver.get(self.address + path)

    def waits_for(self, what, seconds=30):
        """``what`` of the driver, as soon as it is something; htmx puts new elements meanwhile."""
        from selenium.common import StaleElementReferenceException
        from selenium.webdriver.support.wait import WebDriverWait

        ignored = [StaleElementReferenceException]
        wait = WebDriverWait(self.driver, seconds, 0.1, ignored_exceptions=ignored)
        return wait.until(what)

    def sees(self, selector, seconds=30, count=1):
        def seen(driver):
            found = driver.find_elements("css selector", selector)
            enough = len(found) >= count and all(one.is_displayed() for one in found)
            return found[0] if enough else None

        return self.waits_for(seen, seconds)

    def writes(self, selector, text):
        self.sees(selector).clear()
        self.sees(selector).send_keys(text)

    def clicks(self, text):
        xpath = f"//main//*[self::a or self::button][normalize-space()='{text}']"
        self.driver.find_element("xpath", xpath).click()

    def looks(self, name):
        """A picture of the whole page, which is no wider than the window."""
        sizes = "document.documentElement.scrollWidth, innerWidth, document.body.scrollHeight"
        wide, window, high = self.driver.execute_script(f"return [{sizes}]")
        assert wide <= window, f"{name}: {wide} pixels in a window of {window}"
        shown = {"width": window, "height": high, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shown)
        self.pictures += 1
        self.driver.save_screenshot(str(self.folder / f"{self.pictures}-{name}.png"))
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert self.finds_barriers() == [], name

    def finds_barriers(self):
        """What axe calls serious or critical on the page."""
        if "AXE" not in os.environ:
            warnings.warn("AXE names no axe.min.js: axe looked at no page", stacklevel=3)
            return []
        self.driver.execute_script(Path(os.environ["AXE"]).read_text())
        found = self.driver.execute_async_script(
            "const done = arguments[0]; axe.run().then(({violations, passes}) => "
            "done({violations, passes: passes.length}));"
        )
        assert found["passes"] > 0
        return [
            (one["id"], [node["html"] for node in one["nodes"]])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]

    def has_window(self, size):
        """Pages get this size; a window of headless Chromium has a smallest width."""
        width, height = size
        shown = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shown)


@pytest.fixture
def person(address, tmp_path):
    driver = start_browser()
    yield Person(driver, address, tmp_path)
    driver.quit()


def test_from_photos_to_a_file_in_diffusers(person, tmp_path):
    import torch
    from diffusers import StableDiffusionPipeline

    from catversion_jax.integrations.diffusers import load_catversion

    photos = sorted(
        path
        for path in (embedded_folder("tiny-sd-examples") / "dotted_teapot").iterdir()
        if path.suffix in (".png", ".jpg") and ".mask." not in path.name
    )
    person.goes_to("/teach")
    person.looks("teach")
    person.writes("#base_class", "teapot")
    person.writes("#id", "my-teapot")
    person.clicks("Add photos")
    person.sees("#photo-input ~ label")
    person.driver.find_element("id", "photo-input").send_keys("\n".join(map(str, photos)))
    person.sees(".photos li img", count=len(photos))
    person.looks("photos")
    person.clicks("Teach")
    person.sees(".chart", seconds=200)
    person.looks("teaching")
    person.driver.refresh()  # what goes on is the server's
    person.sees(".state.succeeded", seconds=200)
    loaded = "return [...document.images].every(image => image.complete && image.naturalWidth)"
    samples = "return [...document.querySelectorAll('figcaption')].map(one => one.textContent)"
    person.waits_for(lambda driver: "taught" in driver.execute_script(samples), seconds=60)
    person.waits_for(lambda driver: driver.execute_script(loaded))
    person.looks("taught")

    downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
    person.driver.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
    person.clicks("Download")
    files = person.waits_for(lambda _: [*tmp_path.glob("*.safetensors")])

    person.clicks("Draw with it")
    person.writes("#seed", "3")
    person.clicks("Draw")
    pair = "#drawn .pair:first-child figure img"  # below it are samples of the lesson
    person.sees(pair, seconds=120, count=2)
    person.waits_for(lambda driver: driver.execute_script(loaded))
    person.looks("drawn")
    drawn = person.driver.find_elements("css selector", pair)
    mine, plain = (fetched(person.driver, image.get_attribute("src")) for image in drawn)
    assert mine.shape == plain.shape
    assert np.abs(mine - plain).mean() > 2  # levels of 255: the concept is seen

    person.goes_to("/library")
    person.sees(".cards img")
    person.looks("library")
    person.has_window(PHONE)
    for path in ("/teach", "/teach/my-teapot", "/draw", "/library"):
        person.goes_to(path)
        person.sees("main h1")
        person.looks("phone" + path.replace("/", "-"))
        person.has_window(PHONE)
    # htmx reports so the stream of a page that is left, here when it was loaded again
    left = '"[object Event]"'
    errors = [one for one in person.driver.get_log("browser") if one["level"] == "SEVERE"]
    errors = [one for one in errors if not one["message"].endswith(left)]
    assert errors == []

    pipe = StableDiffusionPipeline.from_pretrained(embedded_folder("tiny-sd"))
    prompt = "a teapot on the beach"
    with torch.no_grad():
        before, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
        assert load_catversion(pipe, files[0]) == "my-teapot"
        after, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    length = before.shape[1]
    assert after.shape[1] == length + 16  # states of its own
    assert not torch.allclose(before, after[:, :length], atol=1e-2)
    image = pipe(prompt, num_inference_steps=4, output_type="np").images[0]
    assert image.std() > 0.05


def fetched(driver, address):
    """The pixels of a picture, as the browser gets it."""
    script = """
        const [address, done] = arguments;
        fetch(address).then(answer => answer.arrayBuffer()).then(
            data => done([...new Uint8Array(data)]));"""
    data = bytes(driver.execute_async_script(script, address))
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), np.float32)
