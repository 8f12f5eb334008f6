"""The tunnel of one program or of a proxy: a device in a private namespace, without root.

Nothing else on the machine is touched. The datagrams to the peers leave from outside.
"""

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

from _names import Names
from _proxy import Proxy
from _running import until_signal

import aiotun

from .config import Config
from .service import Options, opened

__all__ = ["serve_command", "serve_proxy"]


async def serve_proxy(config: Config, options: Options, host: str, port: int) -> None:
    """Offer a SOCKS5 and HTTP proxy into the tunnel, until a signal comes."""
    async with aiotun.new_namespace() as ns, opened(config, options, ns) as service:
        names = Names(ns, config.dns, config.search)
        async with await Proxy(ns, names.resolve).serve(host, port) as server:
            bound = server.sockets[0].getsockname()
            await until_signal(f"{bound[0]}:{bound[1]}", *service.work())


async def serve_command(config: Config, options: Options, command: Sequence[str]) -> int:
    """Run a command inside the tunnel, and return its exit status."""
    lines = [f"nameserver {each}" for each in config.dns]
    lines += [f"search {' '.join(config.search)}"] if config.search else []
    resolv_conf = "".join(f"{line}\n" for line in lines) or "# no name server in the tunnel\n"
    async with aiotun.new_namespace() as ns, opened(config, options, ns) as service:
        tasks = [asyncio.create_task(each) for each in service.work()]
        try:
            process = await ns.create_subprocess_exec(*command, resolv_conf=resolv_conf)
            _leave_signals_to(process)
            threading.Thread(target=_stop_with, args=(process.pid,), daemon=True).start()
            ended = asyncio.create_task(process.wait())
            await asyncio.wait([ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    process.kill()
                    await task  # raises what ended it
            status = await ended
            return status if status >= 0 else 128 - status
        except (FileNotFoundError, PermissionError) as error:
            if isinstance(error, aiotun.AiotunError):
                raise
            print(f"wireguard: {command[0]}: {os.strerror(error.errno or 0)}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _leave_signals_to(process: asyncio.subprocess.Process) -> None:
    """The terminal sends Ctrl-C and Ctrl-Z to the command too, which decides what they mean."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
        loop.add_signal_handler(number, lambda: None)
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, process.send_signal, number)


def _stop_with(pid: int) -> None:
    """Stop when the command stops, so that the shell sees it; continue it afterwards.

    In a thread, because uvloop leaves nobody else SIGCHLD.
    """
    with contextlib.suppress(ChildProcessError, ProcessLookupError):  # it has ended
        while _state(pid) == os.CLD_STOPPED:
            os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            # The shell has continued both. The command may have stopped again before we ran.
            changes = os.WCONTINUED | os.WSTOPPED | os.WNOWAIT
            if os.waitid(os.P_PID, pid, changes | os.WNOHANG) is None:
                os.kill(pid, signal.SIGCONT)


def _state(pid: int) -> int:
    """Wait until the command stops or ends. Its exit status is left to the loop (WNOWAIT)."""
    found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    return found.si_code if found is not None else 0
