"""Makes the site's pictures: `python -m docs.pictures`, with the extras test and browser, and chromedriver.

`photos.jpg` is the README's: photos, their labels and Grad-CAM. `report.png` is the report of the digits model,
`serve.png` the page of examples/serve.py with photos dropped on it.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import dpn_jax
from dpn_jax import explain
from tests.examples.test_serve import Server
from tests.support.browser import chromium

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"

TAG = "dpn_mini.cifar10"
PHOTOS = [ROOT / "samples" / f"{name}.jpg" for name in ("cat", "horses", "kingfisher", "moose")]


def photos() -> None:
    """Classifies photos, and shows each with its most probable class and with where the network sees it."""
    classifier = dpn_jax.Classifier.from_pretrained(TAG)
    transform = classifier.transform
    images = np.stack([transform(photo) for photo in PHOTOS])
    maps = explain.grad_cam(dpn_jax.from_pretrained(TAG), images)
    figure = Figure(figsize=(11, 4.7), layout="constrained")
    for photo, heat, (best,), axes in zip(
        PHOTOS, maps, classifier(PHOTOS, top_k=1), figure.subplots(2, len(PHOTOS)).T, strict=True
    ):
        square = Image.open(photo).crop(transform.region(*Image.open(photo).size))
        axes[0].imshow(square)
        axes[0].set_title(f"{best.label}, {best.probability:.0%}")
        axes[1].imshow(explain.overlay(square, heat))
        for axis in axes:
            axis.axis("off")
    figure.savefig(IMAGES / "photos.jpg", dpi=110, pil_kwargs={"quality": 88})


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
    """Starts the service, gives it two photos, and takes its page."""
    server = Server(model=TAG)
    try:
        server.wait()
        with chromium(1000, 900) as chrome:
            chrome.get(server.address)
            chosen = [str(PHOTOS[0]), str(PHOTOS[2])]
            chrome.find_element(By.ID, "file").send_keys("\n".join(chosen))
            WebDriverWait(chrome, 120).until(lambda page: len(page.find_elements(By.CSS_SELECTOR, "section li")) >= 10)
            chrome.save_screenshot(str(IMAGES / "serve.png"))
    finally:
        server.end()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        photos()
        report(Path(folder))
    service()
