"""Chromium without a window, for the pages of the service and of the site; needs selenium and chromedriver."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Literal

from selenium import webdriver


@contextlib.contextmanager
def chromium(
    width: int = 1280, height: int = 1000, *, scheme: Literal["light", "dark"] = "light"
) -> Iterator[webdriver.Chrome]:
    """A browser whose page has this size, in pixels, and whose reader prefers this color scheme."""
    options = webdriver.ChromeOptions()
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu"):
        options.add_argument(word)
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        yield chrome
    finally:
        chrome.quit()
