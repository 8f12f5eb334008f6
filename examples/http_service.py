#!/usr/bin/env python3
"""A ping responder inside a web service that shows and counts its traffic; needs aiohttp.

    pip install 'aiotun[examples]'
    sudo python examples/http_service.py --name tun0 --address 10.0.0.1/24 --http 127.0.0.1:8080

    GET /             a page with charts of packets and bytes a second, and with start and stop
    GET /stats.json   the counters; GET /events sends them every half second, as server-sent events
    GET /metrics      the same for Prometheus
    POST /start       start answering pings; it is started at the beginning
    POST /stop        stop answering: packets wait in the kernel, which drops and counts those that
                      don't fit into its queue

Any web page in a user's browser can send requests here. So the service refuses a Host other than an
address, "localhost" or a --host-name (another site may give its own name to our address), and an
Origin other than its own. This does not keep out clients that are not browsers.

The web application opens and closes the device. Prints "ready NAME" when it serves, and the address
of the page on stderr. On SIGINT and SIGTERM it finishes running requests first.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import ipaddress
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from typing import Any

from _service import Networks, addresses_of, echo, on_signals, parser, run_main

import aiotun

try:
    from aiohttp import web
except ImportError:
    sys.exit(f"{sys.argv[0]}: aiohttp is not installed: pip install 'aiotun[examples]'")

INTERVAL = 0.5  # seconds between two events
PATIENCE = 5.0  # seconds for running requests to finish at the end


class Responder:
    """Answers pings while it is started, and counts them."""

    def __init__(self, tun: aiotun.TunDevice, networks: Networks) -> None:
        self.tun = tun
        self.networks = networks
        self.answered = self.unsent = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        if not self.running:
            self._task = asyncio.create_task(self._answer())

    async def stop(self) -> None:
        """Stop answering; loses no packet, as packets wait in the kernel."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _answer(self) -> None:
        try:
            async for packet in self.tun:
                reply = echo(packet, self.networks)
                if reply is not None:
                    # Don't wait: a task that is stopped while it waits to send would lose the
                    # answer.
                    try:
                        self.tun.send_nowait(reply)
                        self.answered += 1
                    except (aiotun.LinkDownError, aiotun.PacketError, BlockingIOError):
                        self.unsent += 1
        except aiotun.DeviceLostError:
            pass  # the next request for the counters gets the error

    async def counters(self) -> dict[str, int]:
        """The kernel's counters, by its names, and our own.

        Raises:
            aiotun.LinkError: the interface no longer exists.
        """
        kernel = dataclasses.asdict(await self.tun.link.stats())
        return {**kernel, "answered": self.answered, "unsent": self.unsent}

    async def status(self) -> dict[str, Any]:
        counters = await self.counters()
        return {"name": self.tun.name, "running": self.running, "counters": counters}


RESPONDER = web.AppKey("responder", Responder)
ENDING = web.AppKey("ending", asyncio.Event)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def allow_only(host_names: Collection[str]) -> Any:
    """Refuse requests that another site's page makes: by Origin, or by Host (DNS rebinding)."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "")
        if not is_ours(host, host_names):
            return refusal("Host is not an address, localhost or a --host-name")
        origin = request.headers.get("Origin")
        # Don't compare the scheme: a proxy may have added TLS.
        if origin is not None and origin.partition("://")[2] != host:
            return refusal("Origin is another site")
        return await handler(request)

    return check


def is_ours(host: str, host_names: Collection[str]) -> bool:
    """Whether a Host names this service. An address always does, as no name was resolved."""
    name = re.sub(r":\d*$", "", host.lower())  # without the port
    if name in ("localhost", *host_names):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def refusal(why: str) -> web.Response:
    return web.json_response({"error": why}, status=403)


@web.middleware
async def tell_of_loss(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except (aiotun.LinkError, aiotun.DeviceLostError) as error:
        return web.json_response({"error": error.strerror}, status=503)


async def page(request: web.Request) -> web.Response:
    return web.Response(text=PAGE, content_type="text/html")


async def stats(request: web.Request) -> web.Response:
    return web.json_response(await request.app[RESPONDER].status())


async def start(request: web.Request) -> web.Response:
    request.app[RESPONDER].start()
    return await stats(request)


async def stop(request: web.Request) -> web.Response:
    await request.app[RESPONDER].stop()
    return await stats(request)


async def events(request: web.Request) -> web.StreamResponse:
    """Send the counters again and again until the client disconnects or the service ends."""
    responder, ending = request.app[RESPONDER], request.app[ENDING]
    said = json.dumps(await responder.status())  # an error here still becomes the response's status
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    while True:
        try:
            await response.write(f"data: {said}\n\n".encode())
        except ConnectionResetError:  # the client has gone
            return response
        if ending.is_set():
            return response
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ending.wait(), INTERVAL)
        try:
            said = json.dumps(await responder.status())
        except aiotun.LinkError:  # too late for a status; the next request gets it
            return response


async def metrics(request: web.Request) -> web.Response:
    """Prometheus's text format, version 0.0.4."""
    responder = request.app[RESPONDER]
    label = f'{{device="{responder.tun.name}"}}'
    lines = []
    for name, value in (await responder.counters()).items():
        lines += [f"# TYPE aiotun_{name}_total counter", f"aiotun_{name}_total{label} {value}"]
    lines += ["# TYPE aiotun_running gauge", f"aiotun_running{label} {int(responder.running)}"]
    return web.Response(body="\n".join(lines) + "\n", headers={"Content-Type": METRICS_TYPE})


METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def application(args: argparse.Namespace, opener: aiotun.device.Opener[aiotun.TunDevice]) -> Any:
    """The web application. The device is open as long as the application runs."""

    async def device(app: web.Application) -> AsyncIterator[None]:
        async with opener as tun:
            app[RESPONDER] = Responder(tun, Networks(addresses_of(args)))
            app[RESPONDER].start()
            yield
            await app[RESPONDER].stop()

    async def end(app: web.Application) -> None:
        app[ENDING].set()

    app = web.Application(middlewares=[allow_only(args.host_name), tell_of_loss])
    app[ENDING] = asyncio.Event()
    app.cleanup_ctx.append(device)
    app.on_shutdown.append(end)
    app.add_routes(
        [
            web.get("/", page),
            web.get("/stats.json", stats),
            web.get("/events", events),
            web.get("/metrics", metrics),
            web.post("/start", start),
            web.post("/stop", stop),
        ]
    )
    return app


async def serve(args: argparse.Namespace, opener: aiotun.device.Opener[aiotun.TunDevice]) -> None:
    app = application(args, opener)
    runner = web.AppRunner(app, shutdown_timeout=PATIENCE)
    try:
        await runner.setup()
        host, port = args.http
        site = web.TCPSite(runner, host, port)
        await site.start()
        over = asyncio.Event()
        on_signals(over.set)
        address = runner.addresses[0]
        shown = f"[{address[0]}]" if ":" in address[0] else address[0]
        print(f"http://{shown}:{address[1]}/", file=sys.stderr, flush=True)
        print(f"ready {app[RESPONDER].tun.name}", flush=True)
        await over.wait()
    finally:
        await runner.cleanup()


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>aiotun</title>
<style>
  body { font: 16px/1.4 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
  canvas { width: 100%; height: 12em; border: 1px solid #ccc; }
  .in { color: #1668b8; } .out { color: #b85a16; } #error { color: #b00020; }
</style>
<h1 id="name">&nbsp;</h1>
<p><button id="start">start</button> <button id="stop">stop</button> <span id="state"></span></p>
<h2>Packets a second</h2><canvas id="packets"></canvas><p id="packets-now"></p>
<h2>Bytes a second</h2><canvas id="bytes"></canvas><p id="bytes-now"></p>
<p id="error"></p>
<script>
"use strict";
const byId = id => document.getElementById(id);
const KEPT = 240;
const rates = { packets: [], bytes: [] };
let before = null;

function draw(what) {
  const canvas = byId(what), context = canvas.getContext("2d"), points = rates[what];
  canvas.width = canvas.clientWidth; canvas.height = canvas.clientHeight;
  const top = Math.max(1, ...points.map(point => Math.max(...point)));
  ["#1668b8", "#b85a16"].forEach((color, place) => {
    context.strokeStyle = color; context.lineWidth = 2; context.beginPath();
    points.forEach((point, index) => context.lineTo(
      (index + KEPT - points.length) / KEPT * canvas.width,
      canvas.height - 2 - point[place] / top * (canvas.height - 6)));
    context.stroke();
  });
  const now = points[points.length - 1].map(rate => Math.round(rate).toLocaleString());
  byId(what + "-now").innerHTML =
    `<span class="in">${now[0]} to the program</span>, <span class="out">${now[1]} from it</span>`;
}

function show(status) {
  byId("name").textContent = status.name;
  byId("state").textContent = status.running ? "answering pings" : "stopped";
  byId("error").textContent = "";
  const now = performance.now();
  if (before !== null && now > before.now) {
    for (const what in rates) {
      // The kernel transmits what the program receives.
      rates[what].push(["tx_", "rx_"].map(way =>
        (status.counters[way + what] - before.counters[way + what]) / (now - before.now) * 1000));
      rates[what].splice(0, rates[what].length - KEPT);
      draw(what);
    }
  }
  before = { now, counters: status.counters };
}

const source = new EventSource("events");
source.onmessage = event => show(JSON.parse(event.data));
source.onerror = () => { byId("error").textContent = "The service does not answer."; };
for (const what of ["start", "stop"])
  byId(what).onclick = () => fetch(what, { method: "POST" });
</script>
"""


def endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isdecimal() and int(port) <= 65535):
        raise argparse.ArgumentTypeError("HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080")
    return host.removeprefix("[").removesuffix("]"), int(port)


def begin(args: argparse.Namespace) -> int:
    try:
        opener = aiotun.open_tun(args.name, addresses=addresses_of(args))
    except ValueError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        return 2
    return run_main(lambda: serve(args, opener), args.uvloop)


if __name__ == "__main__":
    command = parser(__doc__)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument(
        "--http",
        type=endpoint,
        default="127.0.0.1:8080",
        metavar="HOST:PORT",
        help="where to serve (default: %(default)s)",
    )
    command.add_argument(
        "--host-name",
        type=str.lower,
        action="append",
        default=[],
        metavar="NAME",
        help="a name that browsers may use for it, besides addresses and localhost",
    )
    sys.exit(begin(command.parse_args()))
