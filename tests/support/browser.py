"""A headless Chromium that is driven through a pipe (Chrome DevTools Protocol)."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


def find():
    """Return the path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A page of a running browser."""

    def __init__(self, to_browser, from_browser):
        self._write, self._read = to_browser, from_browser
        self._left, self._calls, self._session = b"", 0, {}
        self.problems = []  # uncaught errors, and what the page's policy has blocked
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        """Return the result of a command."""
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": parameters} | self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._note(answer)

    def _next(self):
        while b"\0" not in self._left:
            assert select.select([self._read], [], [], 60)[0], "the browser is silent"
            chunk = os.read(self._read, 2**20)
            assert chunk, "the browser has ended"
            self._left += chunk
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(event["params"]["exceptionDetails"])
        if event.get("method") == "Log.entryAdded":
            self.problems.append(event["params"]["entry"]["text"])

    def open(self, address, width, height, scale=1.0, dark=False):
        """Show an address in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=scale, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=address)
        self.wait("document.readyState == 'complete'")

    def value(self, expression):
        """Return the value of an expression of JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression, seconds=60):
        """Wait until an expression holds."""
        end = time.monotonic() + seconds
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"still not: {expression}"
            time.sleep(0.05)

    def click(self, selector):
        """Bring an element into view, and press the mouse in its middle."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'nearest', behavior: 'instant'}})")
        box = self.value(
            f"(r => [r.x + r.width / 2, r.y + r.height / 2])({element}.getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left",
                clickCount=1,
            )  # fmt: skip

    def type(self, selector, text):
        """Click on a field and type a text."""
        self.click(selector)
        self.call("Input.insertText", text=text)

    def picture(self):
        """Return the bytes of a PNG of what is seen."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def browsing():
    """Start a Chromium; yield a page of it."""
    to_browser, from_browser = os.pipe(), os.pipe()
    # It reads from 3 and writes to 4.
    shell = ["bash", "-c", 'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"', find(), *_OPTIONS]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [*shell, f"--user-data-dir={profile}"],
            pass_fds=(to_browser[0], from_browser[1]),
            env=os.environ | {"IN": str(to_browser[0]), "OUT": str(from_browser[1])},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Page(to_browser[1], from_browser[0])
        finally:
            os.close(to_browser[1])  # it ends when nobody writes to it
            os.close(from_browser[0])
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
