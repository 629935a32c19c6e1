"""Photograph the console for docs/figures/console.png: `python docs/console.py`. Needs Debian's chromium, and
playwright of the extra test.

The shop of examples/own-data is trained with SENet gates, published and served; the user c007 has three recent events.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from playwright.sync_api import Browser, ViewportSize, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "docs" / "figures" / "console.png"
USER = "c007"
EVENTS = ("p03", "p17", {"id": "p40", "liked": False})
GATES = "model.pairs.0.user.senet.enabled=true"
ARGS = ["--no-sandbox", "--disable-gpu"]
SIZE: ViewportSize = {"width": 1440, "height": 900}
SECONDS = 60
VISITS = 5
"""Visits before the picture: the first answers of a service take longer than later ones."""
SHOWN = ("#answer-1 .best li", "#answer-2 .best li", "#recent li", "#history li", "#legend li")
"""Parts of the page that hold something once the answers have come."""


def photograph(
    browser: Browser, url: str, user: str, events: Sequence[str | dict[str, str | bool]], picture: Path
) -> None:
    """Write a picture of the whole console at a URL: of a user with events, once the answers are shown."""
    page = browser.new_page(viewport=SIZE, locale="en-US", reduced_motion="reduce")
    sent = page.request.post(f"{url}/v1/events", data={"user_id": user, "events": list(events)})
    if not sent.ok:
        raise SystemExit(f"error: the events are answered with {sent.status}: {sent.text()}")
    there = " && ".join(f"document.querySelector('{part}')" for part in SHOWN)
    ready = f"{there} && !document.querySelector('.answer.waiting')"
    for _ in range(VISITS):
        page.goto("about:blank")
        page.goto(f"{url}/#user={user}")
        until = time.monotonic() + SECONDS
        while not page.evaluate(f"() => Boolean({ready})"):
            if time.monotonic() > until:
                raise SystemExit(f"error: the console at {url} shows no answer after {SECONDS} s")
            page.wait_for_timeout(50)
    page.screenshot(path=picture, full_page=True, animations="disabled")
    page.close()


def main() -> int:
    """Train, publish and serve the shop, and write the figure."""
    twotower = [sys.executable, "-m", "twotower"]
    with tempfile.TemporaryDirectory(prefix="twotower-console-") as name:
        run, store, config = f"{name}/run", f"{name}/store", ROOT / "examples" / "own-data.toml"
        subprocess.run([*twotower, "train", config, "--run", run, "--set", GATES], check=True)
        subprocess.run([*twotower, "publish", run, "--store", store], check=True)
        command = [*twotower, "serve", "--store", store, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
            assert service.stdout is not None
            try:
                said = re.search(r"http://[\d.]+:\d+", service.stdout.readline())
                if said is None:
                    raise SystemExit("error: the service does not listen")
                with (
                    sync_playwright() as p,
                    p.chromium.launch(executable_path=shutil.which("chromium"), args=ARGS) as browser,
                ):
                    photograph(browser, said[0], USER, EVENTS, FIGURE)
            finally:
                service.terminate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
