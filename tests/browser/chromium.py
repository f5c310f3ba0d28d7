"""Headless Chromium over its DevTools socket: a page at a width, in dark mode or on paper, and what a script finds on it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
HEIGHT = 844
"""Of a phone's screen, as its 390 px of width."""
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage", "--remote-debugging-port=0", "--no-first-run")


def binary() -> str:
    """The browser: $CHROMIUM, else the first of NAMES on the path. Raises RuntimeError, naming the remedy, where there is none."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise RuntimeError(f"no Chromium ({', '.join(NAMES)}): install one (Debian: apt-get install chromium), or name it in CHROMIUM=")
    return found


class Browser:
    """One page of a running browser."""

    def __init__(self, address: str):
        self.address = address

    def look(self, page: Path, script: str, *, width: int = 390, dark: bool = False, paper: bool = False, shot: Path | None = None) -> Any:
        """What a JavaScript expression is on the page; `shot` keeps a picture of the whole page."""
        return asyncio.run(self._look(page, script, width, dark, paper, shot))

    async def _look(self, page, script, width, dark, paper, shot) -> Any:
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://{self.address}/json/new?about:blank") as answer:
                target = await answer.json()
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                numbers = itertools.count(1)

                async def call(method: str, **params: Any) -> dict[str, Any]:
                    number = next(numbers)
                    await socket.send_json({"id": number, "method": method, "params": params})
                    while True:
                        message = await socket.receive_json(timeout=60)
                        if message.get("id") == number:
                            assert "error" not in message, message["error"]
                            return message["result"]

                await call("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=width < 700)
                features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
                await call("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=features)
                await call("Page.enable")
                await call("Page.navigate", url=page.resolve().as_uri())
                while (await call("Runtime.evaluate", expression="document.readyState + location.href"))["result"]["value"][:13] != "completefile:":
                    await asyncio.sleep(0.05)
                found = await call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
                assert "exceptionDetails" not in found, found
                if shot is not None:
                    data = await call("Page.captureScreenshot", captureBeyondViewport=True)
                    shot.write_bytes(base64.b64decode(data["data"]))
            async with session.get(f"http://{self.address}/json/close/{target['id']}"):
                pass
        return found["result"].get("value")


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A browser of our own with a profile of its own; it ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [binary(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        try:
            told: list[str] = []
            for line in process.stderr:
                told.append(line)
                found = re.search(r"DevTools listening on ws://([^/]+)/", line)
                if found:
                    yield Browser(found[1])
                    break
            else:
                raise RuntimeError(f"Chromium ended before it could be spoken to: {''.join(told)[-2000:]}")
        finally:
            process.terminate()
            process.wait(timeout=20)


def pdf(page: Path, path: Path) -> Path:
    """The page as printed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [binary(), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--no-pdf-header-footer"]
        subprocess.run([*command, f"--print-to-pdf={path}", page.resolve().as_uri()], check=True, capture_output=True, timeout=120)
    return path
