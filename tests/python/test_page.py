"""The server's page in a real browser: chromium, by the W3C WebDriver protocol."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import based
import pytest

from tests.python.serving import PATIENCE, Running, serving

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference


class Browser:
    """A window of chromium."""

    def __init__(self, driver: str, options: dict[str, Any]) -> None:
        self._driver = driver
        found = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": options}})
        self._session = f"/session/{found['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._driver + path, data, {"content-type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self._ask("POST", f"{self._session}/url", {"url": url})

    def run(self, script: str) -> Any:
        """What a script of the page returns."""
        return self._ask("POST", f"{self._session}/execute/sync", {"script": script, "args": []})

    def find(self, selector: str) -> list[str]:
        found = self._ask("POST", f"{self._session}/elements", {"using": "css selector", "value": selector})
        return [each[_ELEMENT] for each in found]

    def click(self, selector: str, text: str = "") -> None:
        """Clicks the last element that has this text."""
        element = [each for each in self.find(selector) if text in self._text(each)][-1]
        self._ask("POST", f"{self._session}/element/{element}/click", {})

    def texts(self, selector: str) -> list[str]:
        return [self._text(each) for each in self.find(selector)]

    def _text(self, element: str) -> str:
        return self._ask("GET", f"{self._session}/element/{element}/text")

    def write(self, selector: str, text: str) -> None:
        (element,) = self.find(selector)
        self._ask("POST", f"{self._session}/element/{element}/clear", {})
        self._ask("POST", f"{self._session}/element/{element}/value", {"text": text})

    def log(self) -> list[str]:
        """What the console says: errors, what the policy forbids."""
        return [entry["message"] for entry in self._ask("POST", f"{self._session}/se/log", {"type": "browser"})]

    def screenshot(self) -> str:
        return self._ask("GET", f"{self._session}/screenshot")

    def close(self) -> None:
        self._ask("DELETE", self._session)


def until(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("chromedriver is missing (Debian: chromium-driver)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "HOME": str(tmp_path)}
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def is_up() -> bool:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/status", timeout=5):
                    return True
                return False

            until(is_up)
            flags = [
                "--headless=new",
                "--no-sandbox",
                "--disable-dev-shm-usage",
                "--disable-gpu",
                "--window-size=1000,900",
            ]
            options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
            with contextlib.closing(Browser(url, options)) as made:
                yield made
        finally:
            process.terminate()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    with serving(based.load(), model_name="based-bytes") as running:
        yield running


def names(server: Running) -> set[str]:
    return {state["id"] for state in server.ask("/v1/states").json["data"]}


def test_the_page(browser: Browser, server: Running) -> None:
    browser.open(server.url)
    until(lambda: "7.8 M parameters" in browser.texts("#about")[0])

    # A turn: tokens come one by one, coloured by their log-probabilities, with the likeliest ones in a tooltip.
    browser.write("#prompt", "def fibonacci(n):")
    browser.write("#max_tokens", "12")
    browser.write("#temperature", "0")
    browser.click("#go")
    until(lambda: "12 new" in browser.texts("#usage")[0])
    tokens = browser.run(
        "return [...document.querySelectorAll('.token')].map(t => [t.textContent, t.style.backgroundColor, t.title])"
    )
    wanted = based.load().generate(["def fibonacci(n):"], based.SamplingParams(max_tokens=12, temperature=0))
    assert len(tokens) == 12 and "".join(text for text, _, _ in tokens) == wanted[0].outputs[0].text
    assert all(colour.startswith("rgb") and "%" in title for _, colour, title in tokens)
    assert len(names(server)) == 1

    # Two more turns go on from the state before; rolling back forgets their states.
    for turn in ("\n# and", " so"):
        browser.write("#prompt", turn)
        browser.click("#go")
        until(lambda turn=turn: browser.run("return running === null && branches[0].turns.at(-1).prompt") == turn)
    assert len(names(server)) == 3 and len(browser.find(".turn")) == 3
    browser.click("button", "Roll back to here")  # the last one: to the second turn
    until(lambda: len(browser.find(".turn")) == 2 and len(names(server)) == 2)

    # A fork goes on by itself.
    browser.click("button", "Fork here")
    until(lambda: browser.texts("#branches button") == ["branch 1", "branch 2"])
    until(lambda: len(names(server)) == 4)
    before = browser.texts(".turn pre")
    browser.write("#prompt", " else")
    browser.click("#go")
    until(lambda: browser.run("return running === null && branches[1].turns.length") == 3)
    browser.click("#branches button", "branch 1")
    until(lambda: browser.texts(".turn pre") == before)

    # What is under way can be stopped: the request ends.
    browser.write("#max_tokens", "100000000")
    browser.write("#prompt", " x")
    browser.click("#go")
    until(lambda: server.engine.stats().running == 1)
    until(lambda: len(browser.find(".turn:last-child .token")) > 3)
    browser.click("#stop")
    until(lambda: server.engine.stats().running == 0)
    until(lambda: browser.run("return running === null"))

    # An error is shown. Nothing else is said, by the page's policy least of all.
    browser.write("#temperature", "-1")
    browser.write("#prompt", "y")
    browser.click("#go")
    until(lambda: "temperature" in browser.texts("#error")[0])
    assert [line for line in browser.log() if "status of 400" not in line] == []


def test_the_page_asks_for_the_key(browser: Browser) -> None:
    with serving(based.load(), api_keys=["open sesame"]) as server:
        browser.open(server.url)
        until(lambda: "no API key" in browser.texts("#about")[0])
        browser.write("#key", "open sesame\t")
        until(lambda: "parameters" in browser.texts("#about")[0])
