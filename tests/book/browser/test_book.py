"""Every page of the built book in headless Chromium. Needs `make book` first; run by `make browser`.

The book is served from a local port. A page passes when it opens, logs no console error, asks nothing of any
other host, shows every image, holds no traceback, and links only to pages and anchors that exist.
"""

import functools
import http.server
import json
import shutil
import threading
from urllib.parse import unquote, urldefrag, urlparse

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tdbook.paths import BUILD

HTML = BUILD / "html"
PAGES = sorted(
    p.relative_to(HTML).as_posix() for part in ("book", "notebooks") for p in (HTML / part).rglob("*.html")
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--window-size=1400,1000",
)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    handler = functools.partial(Quiet, directory=str(HTML))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    options = Options()
    for flag in FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    options.binary_location = next(path for path in found if path)
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


def requested(driver):
    """Addresses that the page asked for since the last call."""
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            yield message["params"]["request"]["url"]


def ready(driver):
    return driver.execute_script("return document.readyState") == "complete"


def test_the_book_is_built():
    assert (HTML / "index.html").is_file(), "run `make book` first"
    assert "book/intro.html" in PAGES and "notebooks/primer.html" in PAGES


@pytest.mark.parametrize("page", PAGES)
def test_page(browser, site, page):
    list(requested(browser))
    browser.get_log("browser")
    browser.get(site + page)
    WebDriverWait(browser, 30).until(ready)
    # Lazy images load when they come into view; mathematics is set after loading.
    broken = browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        const images = [...document.images];
        images.forEach(image => { image.loading = 'eager'; });
        const settle = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
        Promise.all([settle, ...images.map(image => image.decode().catch(() => null))])
            .then(() => done(images.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src)));
    """)
    assert broken == []
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []
    outside = {
        url
        for url in requested(browser)
        if urlparse(url).scheme in ("http", "https") and urlparse(url).hostname != "127.0.0.1"
    }
    assert outside == set()
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "Traceback (most recent call last)" not in text
    assert browser.find_elements(By.CSS_SELECTOR, "mjx-merror") == []
    assert browser.find_elements(By.TAG_NAME, "h1")


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_resolve(browser, site, page):
    browser.get(site + page)
    links = browser.execute_script("return [...document.querySelectorAll('a[href]')].map(a => a.href)")
    missing = []
    for link in {link for link in links if link.startswith(site)}:
        address, anchor = urldefrag(link.removeprefix(site))
        target = HTML / unquote(urlparse(address).path or page)
        if target.is_dir():
            target = target / "index.html"
        known = target.is_file()
        if known and anchor and target.suffix == ".html":
            text = target.read_text(encoding="utf-8")
            known = any(
                f'{key}="{name}"' in text for key in ("id", "name") for name in (anchor, unquote(anchor))
            )
        if not known:
            missing.append(link)
    assert missing == []


def test_executed_chapters_show_figures():
    for page in (p for p in PAGES if p.startswith("notebooks/")):
        assert '<img alt="../_images/' in (HTML / page).read_text(encoding="utf-8"), page


def test_search_finds_tucker(browser, site):
    browser.get(site + "search.html?q=Tucker")
    # Results arrive one after the other.
    primer = '#search-results ul.search li a[href*="notebooks/primer.html"]'
    assert WebDriverWait(browser, 30).until(lambda d: d.find_elements(By.CSS_SELECTOR, primer))


def test_the_front_page_is_reached_from_the_root(browser, site):
    browser.get(site)
    WebDriverWait(browser, 30).until(lambda d: d.current_url.endswith("book/intro.html"))
