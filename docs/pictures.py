"""Makes the site's pictures of pages: `python docs/pictures.py`, with the extras test and browser, and chromedriver.

`report.png` is the report of the digits model, `serve.png` the page of examples/serve.py with digits dropped on it.
"""

import contextlib
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
    python = [sys.executable, "-m"]
    subprocess.run([*python, "recipes.digits_folder", work / "digits"], cwd=ROOT, check=True)
    words = ["evaluate", work / "digits" / "val", "--model", "dpn_tiny.digits", "--report", work / "report"]
    subprocess.run([*python, "dpn_jax", *words], cwd=ROOT, check=True)
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
