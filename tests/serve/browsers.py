"""A headless Chromium, driven through its WebDriver (W3C), where the machine has one."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("chromedriver", "chromium")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def missing() -> str:
    """What a browser test needs and this machine lacks."""
    return ", ".join(name for name in PROGRAMS if shutil.which(name) is None)


@dataclass
class Browser:
    """A window."""

    base: str

    def call(self, path: str, body: object = None, method: str = "POST") -> Any:
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.base + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as found:
            return json.load(found)["value"]

    def open(self, url: str) -> None:
        self.call("/url", {"url": url})

    def run(self, script: str) -> Any:
        """The value that a script returns."""
        return self.call("/execute/sync", {"script": script, "args": []})

    def type(self, css: str, text: str) -> None:
        """Types into a field, as a user does; ``\\n`` is Enter. Also chooses files by path."""
        found = self.call("/element", {"using": "css selector", "value": css})
        self.call(f"/element/{found[ELEMENT]}/value", {"text": text})

    def click(self, css: str) -> None:
        found = self.call("/element", {"using": "css selector", "value": css})
        self.call(f"/element/{found[ELEMENT]}/click")

    def wait(self, script: str) -> None:
        """Waits until a script returns something true."""
        end = time.monotonic() + 60
        while not self.run(script):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def picture(self, path: Path) -> None:
        """Saves what is seen."""
        path.write_bytes(base64.b64decode(self.call("/screenshot", method="GET")))

    def problems(self) -> list[Any]:
        """What the console says."""
        entries: list[Any] = self.call("/se/log", {"type": "browser"})
        return [one for one in entries if "favicon" not in one["message"]]


@contextmanager
def open_browser(folder: Path, width: int = 900, height: int = 900) -> Iterator[Browser]:
    """Starts a browser with a profile in `folder`."""
    driver = subprocess.Popen(
        ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert driver.stdout is not None
        port = next(
            found[1] for line in driver.stdout if (found := re.search(r"on port ([1-9]\d*)", line))
        )
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += [f"--window-size={width},{height}", f"--user-data-dir={folder}"]
        options = {"args": flags, "binary": shutil.which("chromium")}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        root = Browser(f"http://127.0.0.1:{port}")
        session = root.call("/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        browser = Browser(f"{root.base}/session/{session}")
        try:
            yield browser
        finally:
            browser.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.communicate()
