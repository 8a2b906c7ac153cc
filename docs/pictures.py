"""Makes the site's pictures of pages: `python -m docs.pictures`, with the extras test and browser, and chromedriver.

`report.png` is the report of the digits model, `serve.png` the page of examples/serve.py with digits dropped on it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests.examples.test_serve import Server
from tests.support.browser import chromium

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"


def report(work: Path) -> None:
    """Evaluates the digits model on its held-out digits and takes the report's first screen."""
    settings = {"cwd": work, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "check": True}  # the page names the folder
    subprocess.run([sys.executable, "-m", "recipes.digits_folder", "digits"], **settings)
    words = ["evaluate", "digits/val", "--model", "dpn_tiny.digits", "--report", "report"]
    subprocess.run([sys.executable, "-m", "dpn_jax", *words], **settings)
    with chromium(1000, 1300) as chrome:
        chrome.get((work / "report" / "report.html").as_uri())
        chrome.save_screenshot(str(IMAGES / "report.png"))


def service() -> None:
    """Starts the service, gives it two digits, and takes its page."""
    server = Server()
    try:
        server.wait()
        with chromium(1000, 900) as chrome:
            chrome.get(server.address)
            chosen = [str(ROOT / "samples" / "digits" / f"{digit}.png") for digit in (3, 7)]
            chrome.find_element(By.ID, "file").send_keys("\n".join(chosen))
            WebDriverWait(chrome, 120).until(lambda page: len(page.find_elements(By.CSS_SELECTOR, "section li")) >= 10)
            chrome.save_screenshot(str(IMAGES / "serve.png"))
    finally:
        server.end()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        report(Path(folder))
    service()
