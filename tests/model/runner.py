"""One run: opens what a case asks for, takes its steps, and settles the account at the end."""

import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

import uvloop

from .opening import opened
from .packets import Fault
from .stepping import Steps
from .steps import Case
from .transports import Receiver, TransportSteps

__all__ = ["run_case"]

_LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
}


def run_case(case: Case, patience: float = 2.0) -> Fault | None:
    """Run a case on a fresh loop, in this thread's namespace; give what broke."""
    fds = _devices()
    try:
        late = _run(case, patience)
        if late is not None:  # closed by close(): aclose() in another loop returns all the same
            with asyncio.Runner(loop_factory=_LOOPS[case.config.loop]) as runner:
                runner.run(_close_again(late, patience))
    except Fault as fault:
        return fault
    if (left := _devices()) > fds:
        gc.collect()
        left = _devices()
        if left > fds:
            return Fault("leak", f"{left - fds} fds of devices are left open")
    return None


def _run(case: Case, patience: float) -> Any:
    config = case.config
    with asyncio.Runner(debug=config.debug, loop_factory=_LOOPS[config.loop]) as runner:
        loop = runner.get_loop()
        loop.slow_callback_duration = 60.0
        if config.eager and sys.version_info >= (3, 12):
            # Before 3.14 the factory refuses an argument that uvloop gives it.
            if config.loop == "asyncio" or sys.version_info >= (3, 14):
                loop.set_task_factory(asyncio.eager_task_factory)
        return runner.run(_steps(case, patience))


async def _close_again(device: Any, patience: float) -> None:
    try:
        await asyncio.wait_for(device.aclose(), patience)
    except (RuntimeError, TimeoutError) as error:
        raise Fault("closing", f"close() in one loop, aclose() in the next: {error!r}") from error


def _devices() -> int:
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{fd}") == "/dev/net/tun"
    return found


async def _steps(case: Case, patience: float) -> Any:
    receiver = Receiver() if case.config.transport else None
    async with opened(case.config, patience, receiver) as world:

        def failed(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            world.fault("callback", f"{context.get('message')}: {context.get('exception')!r}")

        asyncio.get_running_loop().set_exception_handler(failed)
        steps: Steps = TransportSteps(world, receiver) if receiver is not None else Steps(world)
        if any(step[0] == "wrong_loop" for step in case.steps):
            await steps.bind()
        for step in case.steps:
            try:
                await steps.take(step)
            except Fault as fault:
                fault.add_note(f"in step {step!r}")
                raise
            world.check()
        return await steps.finish(case.config.end)
