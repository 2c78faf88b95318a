"""A headless Chromium, used as a person would: keys, clicks, touches, screens; by its debugging pipe."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--remote-debugging-pipe"),
]
# Chromium reads commands from descriptor 3 and writes answers to 4.
START = (
    "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
KEYS = {
    "End": 35,
    "Home": 36,
    "Escape": 27,
    "Enter": 13,
    "ArrowDown": 40,
    "ArrowRight": 39,
    "Tab": 9,
}

needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")


class Page:
    """One page of a browser of its own."""

    def __init__(self, profile: Path) -> None:
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (*os.pipe(), *os.pipe())]
        theirs, ours = (ends[0], ends[3]), (ends[1], ends[2])
        words = [sys.executable, "-c", START, *map(str, theirs)]
        words += [str(BROWSER), *FLAGS, f"--user-data-dir={profile}"]
        self._process = subprocess.Popen(words, pass_fds=theirs, stderr=subprocess.DEVNULL)
        for fd in theirs:
            os.close(fd)
        self._write, self._read = ours
        self._rest, self._number, self._session = b"", 0, {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        self.send("Page.enable")
        self.screen(1200, 900)

    def close(self) -> None:
        with suppress(OSError, AssertionError):
            self._session = {}
            self.send("Browser.close")
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                part = os.read(self._read, 1 << 16)
                assert part, "the browser has gone"
                self._rest += part
            line, self._rest = self._rest.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def run(self, code: str) -> Any:
        """The value of an expression, waited for where it is a promise."""
        found = self.send(
            "Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def handle(self, selector: str) -> str:
        """The browser's own id of an element."""
        code = f"document.querySelector({json.dumps(selector)})"
        return self.send("Runtime.evaluate", expression=code)["result"]["objectId"]

    def until(self, code: str, seconds: float = 20.0) -> Any:
        """Wait until the expression holds; its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(code)):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.02)
        return value

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        self.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        self.painted()  # keys reach what is on the screen

    def painted(self) -> None:
        """Wait until what was done can be seen."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def screen(self, width: int, height: int, *, touch: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=touch, maxTouchPoints=2)

    def press(self, key: str) -> None:
        code = KEYS.get(key, ord(key[0].upper()))
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        named = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        down = "keyDown" if text else "rawKeyDown"
        self.send("Input.dispatchKeyEvent", type=down, **named, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **named)
        self.painted()

    def type(self, text: str) -> None:
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """A real click in the middle of an element."""
        x, y = self.run(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); node.scrollIntoView"
            "({block: 'nearest'}); const r = node.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def touch(self, kind: str, *points: tuple[float, float]) -> None:
        fingers = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        self.send("Input.dispatchTouchEvent", type=kind, touchPoints=fingers)

    def picture(self, path: Path) -> Path:
        data = self.send("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))
        return path
