"""Draw the README's pictures: screenshots of a running ``make dev``, in headless Chromium.

Belongs here: which pages, in which size. Run ``make dev`` first, then ``make figures``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).parent / "images"

# name: (page, text to wait for, width, height)
PICTURES = {
    "lineage": ("/asset-groups", "datasets", 1900, 620),
}


def draw(page: Page, base: str, name: str) -> Path:
    """Take one picture; waits until the layout has come to rest."""
    path, text, width, height = PICTURES[name]
    page.set_viewport_size({"width": width, "height": height})
    page.goto(base + path)
    page.get_by_text(text, exact=True).last.wait_for()
    page.wait_for_timeout(4_000)
    target = IMAGES / f"{name}.png"
    page.screenshot(path=target)
    return target


def main() -> int:
    """Draw all pictures; 1 when there is no browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:3000", help="address of Dagster UI")
    base = parser.parse_args().url
    browser_path = shutil.which("chromium") or shutil.which("google-chrome")
    if browser_path is None:
        print("no Chromium on PATH; on Debian: apt-get install chromium", file=sys.stderr)
        return 1
    IMAGES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-background-networking"]
        )
        page = browser.new_page()
        for name in PICTURES:
            print(draw(page, base, name))
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
