"""Makes the site's pictures of pages: `python docs/pictures.py`, with the extras test and browser, and chromedriver.

`report.png` is the report of the digits model, `serve.png` the page of examples/serve.py with digits dropped on it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"


@contextlib.contextmanager
def browser(width: int, height: int) -> Iterator[webdriver.Chrome]:
    """Chromium without a window, light, of a size in pixels."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(word)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        yield chrome
    finally:
        chrome.quit()


def report(work: Path) -> None:
    """Evaluates the digits model on its held-out digits and takes the report's first screen."""
    settings = {"cwd": work, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "check": True}  # the page names the folder
    subprocess.run([sys.executable, "-m", "recipes.digits_folder", "digits"], **settings)
    words = ["evaluate", "digits/val", "--model", "dpn_tiny.digits", "--report", "report"]
    subprocess.run([sys.executable, "-m", "dpn_jax", *words], **settings)
    with browser(1000, 1300) as chrome:
        chrome.get((work / "report" / "report.html").as_uri())
        chrome.save_screenshot(str(IMAGES / "report.png"))


def service() -> None:
    """Starts the service, gives it two digits, and takes its page."""
    process = subprocess.Popen([sys.executable, str(ROOT / "examples" / "serve.py"), "--port", "8123"], cwd=ROOT)
    try:
        while not answers("http://127.0.0.1:8123/readyz"):
            time.sleep(1)
        with browser(1000, 900) as chrome:
            chrome.get("http://127.0.0.1:8123")
            chosen = [str(ROOT / "samples" / "digits" / f"{digit}.png") for digit in (3, 7)]
            chrome.find_element(By.ID, "file").send_keys("\n".join(chosen))
            WebDriverWait(chrome, 120).until(lambda page: len(page.find_elements(By.CSS_SELECTOR, "section li")) >= 10)
            chrome.save_screenshot(str(IMAGES / "serve.png"))
    finally:
        process.terminate()
        process.wait()


def answers(address: str) -> bool:
    """Whether a service is ready."""
    try:
        return urllib.request.urlopen(address).status == 200
    except OSError:
        return False


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder))
    service()
