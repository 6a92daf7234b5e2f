"""A browser for the tests of pages."""

import shutil
from pathlib import Path

import pytest

AXE = Path(__file__).resolve().parents[2] / "node_modules/axe-core/axe.min.js"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=found, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Opens files; the test fails when one logs a warning or an error, throws, asks for anything else, or opens a dialog."""
    contexts, trouble = [], []

    def visit(path, hash="", **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1400, "height": 1000}, **options}))
        page = contexts[-1].new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: message.type in ("warning", "error") and trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or trouble.append(request.url))
        page.goto(path.as_uri() + hash)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture
def serious():
    """What axe-core calls a serious violation of a page that was opened with bypass_csp=True."""
    if not AXE.exists():
        pytest.skip("axe-core is not installed: npm install --no-save axe-core")

    def serious(page):
        page.add_script_tag(path=AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [f"{one['id']}: {one['help']} {one['nodes'][0]['html'][:160]}" for one in found
                if one["impact"] in ("serious", "critical")]  # fmt: skip

    return serious
