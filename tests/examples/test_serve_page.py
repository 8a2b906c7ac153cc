"""The page of `examples/serve.py` in a real browser (select with -m browser; needs chromedriver)."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium")
pytest.importorskip("uvicorn")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.examples.test_serve import DIGITS, Server
from tests.support.browser import chromium

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs chromedriver"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    try:
        running.wait()
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=str)
def browser(request: pytest.FixtureRequest) -> Iterator[webdriver.Chrome]:
    width, scheme = request.param
    with chromium(width, 1400, scheme=scheme) as page:
        yield page


def test_a_photo_gets_its_labels_and_a_map(
    server: Server, browser: webdriver.Chrome, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    browser.get(server.address)
    note = tmp_path / "note.jpg"
    note.write_text("no image")
    chosen = [DIGITS[3], DIGITS[7], note]
    browser.find_element(By.ID, "file").send_keys("\n".join(map(str, chosen)))
    WebDriverWait(browser, 60).until(lambda page: len(page.find_elements(By.CSS_SELECTOR, "section")) == 3)
    broken, seven, three = browser.find_elements(By.CSS_SELECTOR, "section")  # the last one on top
    assert "not an image" in broken.find_element(By.CLASS_NAME, "error").text
    for section, label in ((three, "3"), (seven, "7")):
        rows = section.find_elements(By.CSS_SELECTOR, "li")
        assert len(rows) == 5 and rows[0].find_element(By.TAG_NAME, "span").text == label
        photo, overlay = section.find_elements(By.TAG_NAME, "img")
        for image in (photo, overlay):
            assert browser.execute_script("return arguments[0].naturalWidth", image) >= 8
    wide = browser.execute_script("return document.documentElement.scrollWidth > window.innerWidth")
    assert not wide, "nothing is clipped or scrolls sideways"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not [entry for entry in errors if "favicon" not in entry["message"]]
    browser.save_screenshot(str(tmp_path / f"{request.node.callspec.id}.png"))
