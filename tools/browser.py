"""A page as a browser shows it: Chromium without a window, spoken to over its own protocol.

It is no package: what needs it is skipped, with a sentence, where there is none.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import websocket  # comes with JupyterLab

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--remote-debugging-port=0", "--remote-allow-origins=*")  # fmt: skip
# Formulas are set after the page has loaded, and change its widths.
READY = """(async () => {
  const start = performance.now();
  const late = new Error("the page is not ready after PATIENCE_S s");
  const wait = ms => new Promise((done, fail) =>
    performance.now() - start > 1000 * PATIENCE_S ? fail(late) : setTimeout(done, ms));
  while (document.readyState !== "complete") await wait(20);
  if (document.querySelector(".math")) {
    while (!window.MathJax?.startup?.promise) await wait(20);
    await MathJax.startup.promise;
  }
  await document.fonts.ready;
  await wait(100);
  return true;
})()"""


def find() -> str | None:
    """The browser of this machine."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """One tab; use it as a context."""

    def __init__(self, patience_s: int = 30) -> None:
        """Start it; after `patience_s` seconds a page that is not ready is given up."""
        self.patience_s = patience_s
        self.home = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [find(), *FLAGS, f"--user-data-dir={self.home.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.count, self.session = 0, None
        try:
            self.socket = websocket.create_connection(self._address(), timeout=90 + patience_s, max_size=None)
            page = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
            self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        except BaseException:  # nobody enters the context, so that nobody would leave it
            self._stop()
            raise

    def _address(self) -> str:
        told, stop = Path(self.home.name) / "DevToolsActivePort", time.monotonic() + 60
        while not (told.exists() and len(told.read_text().split()) == 2):
            if time.monotonic() > stop or self.process.poll() is not None:
                raise RuntimeError(f"{find()} did not start")
            time.sleep(0.05)
        port, path = told.read_text().split()
        return f"ws://127.0.0.1:{port}{path}"

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *exception: object) -> None:
        self.socket.close()
        self._stop()

    def _stop(self) -> None:
        """End the process and remove its folder."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.home.cleanup()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the DevTools protocol, and its answer."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.socket.send(json.dumps(message))
        while True:
            answer = json.loads(self.socket.recv())
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def open(self, page: Path, width: int = 1280, dark: bool = False, height: int = 900, media: str = "") -> None:
        """Show a page in a window of this size (or on paper: `media="print"`), and wait until its formulas stand."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=False)  # fmt: skip
        self.call("Emulation.setScrollbarsHidden", hidden=media == "print")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme], media=media)
        self.call("Page.navigate", url=page.as_uri())
        self.run(READY.replace("PATIENCE_S", str(self.patience_s)))

    def picture(self, file: Path, **clip: float) -> None:
        """A screenshot of what is in the window, or of `x, y, width, height` of the page."""
        more = {"clip": {"scale": 1, **clip}, "captureBeyondViewport": True} if clip else {}
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"]))
