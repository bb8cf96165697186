"""Headless Chromium for tests of pages, by its DevTools protocol.

    with chromium.Browser() as browser:
        page = browser.open(url)
        page.wait_for("document.querySelector('h1')")

The protocol runs over two pipes (`--remote-debugging-pipe`): file descriptor 3
of Chromium reads messages of JSON, each ended by a zero byte, and 4 writes
them. Nothing but the standard library is needed for that.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

_SECONDS = 120.0
# Starts Chromium with the descriptors that it expects.
_START = (
    "import os, sys; reader, writer = map(int, sys.argv[1:3]); "
    "os.dup2(reader, 103); os.dup2(writer, 104); os.dup2(103, 3); "
    "os.dup2(104, 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def executable():
    """Path of Chromium; skips the test if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path is not None:
            return path
    pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")


class Browser:
    """A headless Chromium with an empty profile, used as `with Browser()`.

    Attributes:
        events: Messages that no one asked for, such as requests of pages.
    """

    def __init__(self):
        self._path = executable()

    def __enter__(self):
        self.events = []
        self._number, self._received = 0, b""
        self._profile = tempfile.mkdtemp(prefix="chromium_")
        to_child, self._writer = os.pipe()
        self._reader, from_child = os.pipe()
        options = [
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile}",
            # Its sandbox does not work as root, nor /dev/shm in containers.
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-c", _START]
            + [str(to_child), str(from_child), self._path, *options],
            pass_fds=(to_child, from_child),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        return self

    def __exit__(self, *exception):
        try:
            self.call("Browser.close")
            self._process.wait(30)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._writer)
        os.close(self._reader)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method, session=None, **parameters):
        """Calls a method of the protocol; returns its result, a dict."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writer, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def _receive(self):
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._reader], [], [], _SECONDS)
            data = os.read(self._reader, 1 << 20) if ready else b""
            assert data, "Chromium does not answer"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def open(self, url, width=1280, height=900, mobile=False):
        """Opens a page in a tab of its own; returns a `Page`."""
        target = self.call("Target.createTarget", url="about:blank")
        session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            page.call(f"{domain}.enable")
        page.resize(width, height, mobile)
        page.call("Page.navigate", url=url)
        page.wait_for("document.readyState === 'complete'")
        return page


class Page:
    """A page in a `Browser`.

    Args:
        browser: The `Browser`.
        session: Id of its session in the protocol.
    """

    def __init__(self, browser, session):
        self._browser, self._session = browser, session

    def call(self, method, **parameters):
        """Calls a method of the protocol for this page."""
        return self._browser.call(method, self._session, **parameters)

    def resize(self, width, height, mobile=False):
        """Sets the size of the window in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def evaluate(self, script):
        """The value of an expression of JavaScript, as JSON would hold it."""
        result = self.call(
            "Runtime.evaluate",
            expression=script,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, script, seconds=_SECONDS):
        """Waits until an expression is true; returns its value."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            value = self.evaluate(script)
            if value:
                return value
            time.sleep(0.05)
        text = self.evaluate("document.body.innerText")
        raise AssertionError(f"{script} is not true of the page:\n{text}")

    def choose_files(self, selector, paths):
        """Chooses files in an input, as a person does in its dialog.

        Chromium reads no path with ".." in it, and a dialog gives none.
        """
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        found = self.call("DOM.querySelector", nodeId=root, selector=selector)
        self.call(
            "DOM.setFileInputFiles",
            nodeId=found["nodeId"],
            files=[*map(os.path.realpath, paths)],
        )

    def press(self, key, code=None, text=None):
        """Presses and releases a key, such as "Tab" or "ArrowRight"."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
        codes |= {"ArrowLeft": 37, "ArrowRight": 39}
        values = {"key": key, "code": code or key}
        values["windowsVirtualKeyCode"] = codes.get(key, 0)
        text = {"Enter": "\r", " ": " "}.get(key, text)
        pressed = values if text is None else {**values, "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **values)

    def screenshot(self, path=None, whole=True, **options):
        """A picture of the page.

        Args:
            path: File to write, or None.
            whole: Whether it shows the whole page, not only the window.
            **options: Of `Page.captureScreenshot`, such as format="jpeg".

        Returns:
            Bytes of a PNG, or of what `format` says.
        """
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options["clip"] = {**size, "scale": 1}
        found = self.call(
            "Page.captureScreenshot", captureBeyondViewport=whole, **options
        )
        content = base64.b64decode(found["data"])
        if path is not None:
            with open(path, "wb") as file:
                file.write(content)
        return content

    def requested(self):
        """Addresses that this page has requested so far."""
        self.evaluate("0")  # Receives what has been sent.
        return [
            event["params"]["request"]["url"]
            for event in self._own("Network.requestWillBeSent")
        ]

    def complaints(self):
        """Errors and warnings of the page in the browser's console."""
        self.evaluate("0")
        logged = [
            event["params"]["entry"]["text"]
            for event in self._own("Log.entryAdded")
        ]
        thrown = [
            event["params"]["exceptionDetails"]["text"]
            for event in self._own("Runtime.exceptionThrown")
        ]
        return logged + thrown

    def _own(self, method):
        return [
            event
            for event in self._browser.events
            if event.get("method") == method
            and event.get("sessionId") == self._session
        ]
