"""The built site: links, and its pages in a real browser (select with -m docs; needs the extra docs).

`DPN_JAX_SITE` names a site that is built already.
"""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urldefrag, urlsplit

import pytest

bs4 = pytest.importorskip("bs4")
pytest.importorskip("furo")

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[2]
GENERATED = {"genindex.html", "search.html", "py-modindex.html"}

SEARCHES = {
    "freeze batch norm": {"faq", "guides/finetune"},
    "TPU v5e batch size": {"tpu", "performance", "notebooks/08_scaling"},
    "load my .pth": {"faq", "guides/port"},
    "Grad-CAM": {"guides/explain", "api/explain"},
    "resume": {"guides/finetune", "tpu"},
    "loss is NaN": {"guides/finetune"},
    "grayscale": {"faq"},
    "confusion matrix": {"guides/evaluate", "api/evaluation"},
    "squeeze-and-excitation": {"guides/change", "notebooks/06_change_the_block"},
    "push_to_hub": {"guides/port", "api/checkpoint"},
    "offline": {"start/classify", "faq"},
    "out of memory": {"faq"},
    "gradient accumulation": {"guides/finetune"},
    "several GPUs": {"guides/hosts", "faq"},
    "cite": {"faq"},
    "input channels": {"faq", "guides/port", "guides/change"},
}
"""What a user types -> pages of which one must be among the first five results."""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    if "DPN_JAX_SITE" in os.environ:
        return Path(os.environ["DPN_JAX_SITE"])
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "-n", "-b", "html", ROOT / "docs", folder]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
    return folder


def pages(site: Path) -> list[Path]:
    """The pages that somebody wrote, and the API reference."""
    return [
        path for path in sorted(site.rglob("*.html")) if path.name not in GENERATED and "_modules" not in path.parts
    ]


def test_no_link_and_no_anchor_is_dead(site: Path) -> None:
    @functools.cache
    def parsed(path: Path) -> "bs4.BeautifulSoup":
        return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")

    @functools.cache
    def anchors(path: Path) -> frozenset[str]:
        return frozenset(tag["id"] for tag in parsed(path).find_all(id=True))

    assert len(pages(site)) > 40
    dead = []
    for page in pages(site):
        found = [tag.get("href") or tag.get("src") for tag in parsed(page).find_all(["a", "img", "link", "script"])]
        for link in filter(None, found):
            if urlsplit(link).scheme:
                continue
            path, anchor = urldefrag(link)
            target = (page.parent / unquote(urlsplit(path).path)).resolve() if path else page
            if not target.is_file() or (anchor and target.suffix == ".html" and unquote(anchor) not in anchors(target)):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert not dead


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """The site served on 127.0.0.1: a search reads pages, which a browser forbids for files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser(request: pytest.FixtureRequest) -> Iterator[object]:
    """Of the test's width and color scheme, where it has any."""
    pytest.importorskip("selenium")
    if shutil.which("chromedriver") is None:
        pytest.skip("needs chromedriver")
    from tests.support.browser import chromium

    given = getattr(getattr(request.node, "callspec", None), "params", {})
    with chromium(given.get("width", 1280), scheme=given.get("scheme", "light")) as page:
        yield page


@pytest.mark.browser
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.exhaustive),
        pytest.param(390, "light", marks=pytest.mark.exhaustive),
    ],
)
def test_every_page_fits_and_shows_its_pictures(
    width: int, scheme: str, address: str, site: Path, browser: object, tmp_path: Path
) -> None:
    folder = Path(os.environ.get("DPN_JAX_SCREENSHOTS", tmp_path))
    faults = []
    for page in pages(site):
        name = str(page.relative_to(site).with_suffix(""))
        browser.get(f"{address}/{quote(name)}.html")
        if browser.execute_script("return document.documentElement.scrollWidth > window.innerWidth + 1"):
            faults.append(f"{name} scrolls sideways")
        broken = (
            "return [...document.querySelectorAll('article img')].filter(i => i.loading != 'lazy' && !i.naturalWidth)"
        )
        faults += [f"{name}: {image.get_attribute('src')}" for image in browser.execute_script(broken)]
        browser.save_screenshot(str(folder / f"{name.replace('/', '-')}-{width}-{scheme}.png"))
    assert not faults


@pytest.mark.browser
@pytest.mark.parametrize("words", SEARCHES)
def test_what_a_user_types_is_found(words: str, address: str, browser: object) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{address}/search.html?q={quote(words)}")
    done = "#search-results .search-summary"
    WebDriverWait(browser, 30).until(lambda page: "found" in page.find_element(By.CSS_SELECTOR, done).text)
    results = browser.find_elements(By.CSS_SELECTOR, "#search-results ul.search li > a")
    found = [urlsplit(link.get_attribute("href")).path.removesuffix(".html").strip("/") for link in results[:5]]
    assert SEARCHES[words] & set(found), found
