"""The page in a browser, over serve.py with the tiny checkpoints: Debian's chromium, driven by Playwright."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from kandinsky.outputs.media import write_video
from tests.limits import PATIENCE

REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
KEY = "a key"
CIRCLE = "a red circle moves left on a white background"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="Debian's chromium")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright

        if not CHROMIUM.exists():
            raise ImportError(f"{CHROMIUM} is not there")
    except ImportError as error:
        if os.environ.get("KANDINSKY_NEEDS_BROWSER") == "1":
            raise
        pytest.skip(f"no browser: {error}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(browser: Any, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server listens that has a key, and a model for each task."""
    folder = tmp_path_factory.mktemp("page")
    names = ("t2v", "i2v", "t2i", "i2i")
    words = [w for name in names for w in ("--config", str(REPOSITORY / f"configs/config_tiny_{name}.yaml"))]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "serve.py"), *words, "--port", "0", "--device", "cpu", "--api_key", KEY],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        assert process.stdout is not None
        found = process.stdout.readline().strip()
        assert found.startswith("http://"), (folder / "log").read_text()
        yield found
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Any:
    """Signed in; all that it fetches is the server's own."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(300_000)  # milliseconds; a whole tiny run takes a few thousand
    elsewhere: list[str] = []
    page.on("request", lambda r: elsewhere.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
    page.goto(address)
    page.fill("#key", "not it")
    page.click("button")
    assert "not the key" in page.text_content("p[role=alert]")
    page.fill("#key", KEY)
    page.click("button")
    page.wait_for_selector("#t2v-make")
    yield page
    assert elsewhere == []


def test_each_task_keeps_its_tab(page: Any) -> None:
    """Also after others were looked at."""
    tabs = page.locator("button[role=tab]")
    for name in ("Animate", "Picture", "Edit", "Video"):
        page.click(f"button[role=tab]:has-text('{name}')")
        page.wait_for_selector(f"button[role=tab][aria-selected=true]:has-text('{name}')")
    assert tabs.all_text_contents() == ["Video", "Animate", "Picture", "Edit"]


def test_a_video_from_words_cancelled_made_and_its_settings_used_again(page: Any) -> None:
    page.wait_for_selector("#t2v-plan .k-plan:has-text('GB of memory')")  # known before anything is made
    page.fill("#t2v-prompt textarea", CIRCLE)
    page.click("#t2v-advanced button")
    page.fill("#t2v-steps input", "1000")
    page.click("#t2v-make")
    page.wait_for_selector("#shown .k-running progress[value]:not([value='0'])")
    page.click("#cancel")
    page.wait_for_selector("#shown .k-error:has-text('cancelled')")

    page.fill("#t2v-steps input", "16")
    page.fill("#t2v-seed textarea, #t2v-seed input", "7")
    page.click("#t2v-make")
    page.wait_for_selector("#shown .k-preview")
    assert page.wait_for_function("document.querySelector('#shown .k-preview')?.naturalWidth ?? 1")
    page.wait_for_selector("#shown video")
    page.wait_for_function("document.querySelector('#shown video').readyState >= 2")
    page.wait_for_function("document.querySelector('#shown video').currentTime > 0")
    links = page.locator("#shown .k-links a")
    assert links.all_text_contents() == ["MP4", "JSON"]
    assert page.request.get(page.url.rstrip("/") + links.nth(1).get_attribute("href")).json()["seed"] == 7

    seed = "#t2v-seed textarea, #t2v-seed input"
    page.fill(seed, "")
    page.click("#t2v-again")  # that of the last one
    page.wait_for_function(f"document.querySelector('{seed}').value === '7'")
    page.click("#t2v-new")
    page.wait_for_function(f"document.querySelector('{seed}').value === ''")

    page.fill("#t2v-prompt textarea", "other words")
    page.fill("#t2v-seed textarea, #t2v-seed input", "")
    page.locator("#gallery .k-card:has(img) button[data-action=use]").first.click()
    page.wait_for_function(f"document.querySelector('#t2v-prompt textarea').value === '{CIRCLE}'")
    assert page.input_value("#t2v-seed textarea, #t2v-seed input") == "7"
    page.wait_for_selector("#t2v-plan .k-plan:has-text('about')")  # seconds, by the job before

    cancelled = page.locator("#gallery .k-card:has(.k-face:has-text('cancelled'))")
    there, left = page.locator("#gallery .k-card").count(), page.locator("#gallery .k-card:has(img)").count()
    assert cancelled.count() == there - left == 1
    cancelled.locator("button[data-action=delete]").click()
    page.wait_for_function(f"document.querySelectorAll('#gallery .k-card').length === {left}")
    assert cancelled.count() == 0


def test_a_mistake_is_a_sentence(page: Any) -> None:
    page.fill("#t2v-seed textarea, #t2v-seed input", "many")
    page.click("#t2v-make")
    page.wait_for_selector("#shown .k-error:has-text('eed is')")


def test_a_picture_is_dropped(page: Any, tmp_path: Path) -> None:
    Image.new("RGB", (128, 128), "red").save(tmp_path / "red.png")
    (tmp_path / "text.png").write_text("no picture")
    page.click("button[role=tab]:has-text('Animate')")
    page.set_input_files("#i2v-picture input[type=file]", str(tmp_path / "text.png"))
    page.wait_for_selector("#i2v-plan .k-error:has-text('give a PNG, JPEG, WebP, GIF, BMP or TIFF file')")
    page.set_input_files("#i2v-picture input[type=file]", str(tmp_path / "red.png"))
    page.wait_for_selector("#i2v-picture img")
    page.fill("#i2v-prompt textarea", "a red square grows")
    page.click("#i2v-advanced button")
    page.fill("#i2v-steps input", "2")
    page.click("#i2v-make")
    page.wait_for_selector("#shown video")


def test_a_video_is_the_source_and_goes_on(page: Any, tmp_path: Path) -> None:
    """Its file, what is kept of it for "use these", and segments of a prompt each; all of the form."""
    write_video(np.zeros((9, 64, 64, 3), np.uint8), tmp_path / "dark.mp4", 24)
    page.click("button[role=tab]:has-text('Video')")
    page.click("#t2v-directed button")
    page.set_input_files("#t2v-video input[type=file]", str(tmp_path / "dark.mp4"))
    page.wait_for_selector("#t2v-video:has-text('dark')")
    page.fill("#t2v-prompt textarea", CIRCLE)
    page.fill("#t2v-steps input", "2")
    page.fill("#t2v-seed textarea, #t2v-seed input", "")
    page.click("#t2v-make")
    page.wait_for_selector("#shown .k-done:has-text('Strength')", state="attached")
    made = page.get_attribute("#shown .k-done", "data-id")
    page.fill("#t2v-then textarea", "a red circle moves right on a white background")
    page.click("#t2v-make")
    page.wait_for_selector(f"#shown .k-done:not([data-id='{made}']):has-text('Overlap')", state="attached")
    # The first one's settings again: its video is there, and there are no segments. The gallery is made anew when the
    # second one is done, and who presses just then presses what is no more.
    page.wait_for_selector(f"#gallery .k-card:first-child:not([data-id='{made}']) img", state="attached")
    page.locator(f"#gallery .k-card[data-id='{made}'] button[data-action=use]").click()
    page.wait_for_function("document.querySelector('#t2v-then textarea').value === ''")
    assert "dark" in page.text_content("#t2v-video")


def test_narrow(page: Any) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_no_door_around_the_key(address: str) -> None:
    with httpx.Client(base_url=address) as client:
        assert "server's key" in client.get("/").text
        for path in ("/config", "/gradio_api/queue/data?session_hash=x", "/gradio_api/file=/etc/passwd"):
            assert client.get(path).status_code == 401
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        assert client.post("/sign_in", data={"key": KEY}).status_code == 303
        assert client.get("/config").status_code == 200
        assert client.get("/v1/jobs").status_code == 401  # the cookie opens the page alone
        for name in ("/etc/passwd", "http://127.0.0.1:1/x.png"):
            assert client.get(f"/gradio_api/file={name}").status_code == 403
            data = {"path": name, "meta": {"_type": "gradio.FileData"}}
            sent = {"data": [data], "fn_index": 0, "session_hash": "x"}
            assert client.post("/gradio_api/queue/join", json=sent).status_code == 403
        too_large = (b"x" * 1_000_000 for _ in range(40))
        assert client.post("/gradio_api/upload", content=too_large).status_code == 413
        assert client.get("/gradio_api/info").status_code == 404
        assert client.get("/config", headers={"Origin": "http://elsewhere.example"}).status_code == 403
