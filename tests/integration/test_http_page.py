"""The page of the web service example, in a real browser."""

import asyncio
import base64
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ..helpers import need, wait_until
from .test_http_service import served

pytestmark = [pytest.mark.peers, pytest.mark.asyncio(loop_factories=["asyncio"])]

PAGE = "http://127.0.0.1:8080/"

# Resolves when `condition` holds; the page updates twice a second.
UNTIL = """
    new Promise((resolve, reject) => {{
        const started = performance.now();
        (function look() {{
            const element = document.querySelector("{element}");
            if ({condition}) resolve(true);
            else if (performance.now() - started > 15000) reject("not within 15 s");
            else setTimeout(look, 50);
        }})();
    }})
"""

DRAWN = """
    element.getContext("2d").getImageData(0, 0, element.width, element.height)
        .data.some(value => value > 0)
"""


class Tab:
    """A page in the browser, controlled by the DevTools protocol."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)

    async def ask(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = await self._socket.receive_json(timeout=30)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def open(self, address: str) -> None:
        await self.ask("Page.enable")
        await self.ask("Page.navigate", url=address)
        while (await self._socket.receive_json(timeout=30)).get("method") != "Page.loadEventFired":
            pass

    async def evaluate(self, expression: str) -> Any:
        result = await self.ask(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, element: str, condition: str) -> None:
        expression = UNTIL.format(element=element, condition=condition)
        assert await self.evaluate(expression) is True


@contextlib.asynccontextmanager
async def tab(folder: Path) -> AsyncIterator[Tab]:
    """The service's page, in a new browser."""
    browser = need("chromium")
    import aiohttp

    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    port_file = folder / "DevToolsActivePort"
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        await wait_until(lambda: port_file.exists() and "\n" in port_file.read_text(), 30)
        port = int(port_file.read_text().split()[0])
        async with aiohttp.ClientSession() as session:
            asked = f"http://127.0.0.1:{port}/json/new?about:blank"
            async with session.put(asked) as answer:
                where = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(where, max_msg_size=0) as socket:
                made = Tab(socket)
                await made.open(PAGE)
                yield made
    finally:
        process.terminate()
        await process.wait()


@contextlib.contextmanager
def pings(pinger: Any) -> Iterator[None]:
    """Ping all the time in a thread."""
    over = threading.Event()

    def ping() -> None:
        while not over.is_set():
            pinger.check("10.81.0.2")
            over.wait(0.01)

    thread = threading.Thread(target=ping)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


async def test_the_page_shows_what_happens(tmp_path: Path) -> None:
    with served() as (service, pinger):
        async with tab(tmp_path / "profile") as page:
            with pings(pinger):
                for what in ("packets", "bytes"):
                    await page.until(f"#{what}-now", "/[1-9]/.test(element.textContent)")
                    await page.until(f"#{what}", DRAWN)  # a line has two points
            picture = await page.ask("Page.captureScreenshot", format="png")
            (tmp_path / "page.png").write_bytes(base64.b64decode(picture["data"]))
            assert await page.evaluate("document.querySelector('#name').textContent") == "ex0"
            await page.evaluate("document.querySelector('#stop').click()")
            await page.until("#state", "element.textContent == 'stopped'")
            await page.evaluate("document.querySelector('#start').click()")
            await page.until("#state", "element.textContent == 'answering pings'")
        await asyncio.to_thread(pinger.check, "10.81.0.3")
        assert service.end() == ""
