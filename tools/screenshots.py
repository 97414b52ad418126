"""Pictures of the page for docs/images, of a server with the tiny configs.

python -m tools.screenshots http://127.0.0.1:8000
"""

from __future__ import annotations

import sys
from pathlib import Path

CHROMIUM = "/usr/bin/chromium"  # Debian's
FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
PROMPT = "a red circle moves left on a white background"


def main(address: str) -> None:
    """One wide and one as on a telephone, each under 200 KB."""
    from playwright.sync_api import sync_playwright

    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.fill("#t2v-prompt textarea", PROMPT)
        page.click("#t2v-make")
        page.wait_for_selector("#shown video", timeout=300_000)
        page.wait_for_selector("#gallery .k-card img")
        page.wait_for_timeout(500)  # the thumbnail
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(300)
            page.screenshot(path=str(FOLDER / f"page_{width}.png"), full_page=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
