"""Opens pages in Chromium, without a window and without a network."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

# By itself, Chromium asks its maker for this and that, without an origin; what a page asks for has one.
NO_PAGE = "not an origin"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--window-size=1280,900",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=5000",
    "--net-log-capture-mode=Everything",
    "--enable-logging=stderr",
    "--dump-dom",
)


class Visit(NamedTuple):
    """What became of a page: the document as it ended up, what it asked the network for, and its console."""

    document: str
    requests: list[str]
    console: list[str]


def find_browser() -> str:
    """Where Chromium is; skips the test where it is not."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        # Where it is not installed, some systems have a program of this name that says how to.
        if path is not None and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    pytest.skip("needs Chromium: looked for chromium, chromium-browser and google-chrome")


def open_page(browser: str, page: str, folder: Path) -> Visit:
    """Opens a page from a file in an empty folder."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    log = folder / "log.json"
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={folder / 'user'}", f"--log-net-log={log}",
         (folder / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "<body>" in done.stdout, done.stderr
    logged = json.loads(log.read_text())
    start = logged["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    requests = [event["params"] for event in logged["events"] if event["type"] == start and "params" in event]
    asked = [x["url"] for x in requests if "url" in x and x.get("initiator") != NO_PAGE]
    return Visit(done.stdout, asked, re.findall(r"CONSOLE[^\]]*\] (.*)", done.stderr))
