"""Headless Chromium over its debugging pipe: what a page looks like, and what it asks for."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

_LIMIT_S = 60.0


@dataclass
class Browser:
    """One page. `requests`: addresses that it has asked for; `errors`: on its console."""

    _write: int
    _read: int
    _number: int = 0
    _session: str = ""
    _pending: list[bytes] = field(default_factory=lambda: [b""])
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._pending[-1]:
            more = os.read(self._read, 1 << 20)
            assert more, "the browser has gone"
            self._pending.append(more)
        text, _, rest = b"".join(self._pending).partition(b"\0")
        self._pending = [rest]
        event = json.loads(text)
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(event["params"]["request"]["url"])
        if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.errors.append(json.dumps(event["params"])[:300])
        return event

    def open(self, page: Path, width: int, media: str = "screen") -> None:
        """Load the page in a window of so many pixels."""
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=844,
                  deviceScaleFactor=1, mobile=width < 500)  # fmt: skip
        self.call("Emulation.setEmulatedMedia", media=media)
        self.call("Page.navigate", url=page.absolute().as_uri())
        deadline = time.monotonic() + _LIMIT_S
        while self.value("document.readyState") != "complete":
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def value(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    """For its profile, which it still writes to as it ends."""
    folder = tempfile.mkdtemp(prefix="knl-browser-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no Chromium: this machine lacks Debian package chromium")
    into, out = os.pipe(), os.pipe()
    with _folder() as folder:
        command = [program, "--headless=new", "--no-sandbox", "--disable-gpu",
                   "--remote-debugging-pipe", "--disable-dev-shm-usage", "--hide-scrollbars",
                   f"--user-data-dir={folder}", "about:blank"]  # fmt: skip
        # The protocol has it that it reads 3 and writes 4.
        shell = ["bash", "-c", f'exec "$@" 3<&{into[0]} 4>&{out[1]}', "bash", *command]
        process = subprocess.Popen(
            shell, pass_fds=(into[0], out[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(into[0])
        os.close(out[1])
        try:
            yield Browser(into[1], out[0])
        finally:
            os.close(into[1])
            os.close(out[0])
            process.terminate()
            process.wait(timeout=20)
