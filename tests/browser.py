"""A real browser for pages under test: headless Chromium, driven by Playwright."""

import contextlib
import os
import shutil

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]  # fmt: skip

DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}

needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="no Chromium here; CHROMIUM=/path/to/it names one")


def close_pages(*pages):
    """Closes pages; a request that a test answers in the server's place may be under way, and is left alone."""
    for page in pages:
        page.unroute_all(behavior="ignoreErrors")
        page.close()


@contextlib.contextmanager
def open_browser():
    """A browser; its pages end with it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()
