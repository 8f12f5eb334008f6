"""Programs inside a namespace, started as asyncio starts them outside."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import marshal
import operator
import os
import signal
import socket
from collections.abc import Iterable
from typing import Any

from .._kernel import interpreters, launch, threads
from .._kernel.namespaces import NamespaceFd
from ..errors import NotPermittedError

__all__ = ["Word", "start"]

Word = str | bytes | os.PathLike[str] | os.PathLike[bytes]

# Ctrl-C would make a starting Python print a traceback. If the signal is ignored when Python
# starts, Python goes on ignoring it. `launch` restores the signal for the program.
_WITHOUT_CTRL_C = ("/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh")

Ids = tuple[int | None, int | None, list[int] | None]


async def start(
    net: NamespaceFd,
    user: NamespaceFd | None,
    words: tuple[Word, ...],
    resolv_conf: str | None,
    options: dict[str, Any],
) -> asyncio.subprocess.Process:
    """Start a program in a network namespace; see `Namespace.create_subprocess_exec`.

    asyncio starts an interpreter, which enters the namespace and then executes the program. That
    takes about 30 ms. A `preexec_fn` would block the event loop for that long, so only frozen
    programs use it: they have no interpreter.

    Args:
        net: the network namespace.
        user: the user namespace around it, if the process has to enter that, too.
        words: the program and its arguments.
        resolv_conf: the text of the program's /etc/resolv.conf, or None.
        options: options of `asyncio.create_subprocess_exec`.
    """
    if resolv_conf is not None and not isinstance(resolv_conf, str):
        raise TypeError(f"resolv_conf must be a str, the text of the file, got {resolv_conf!r}")
    ids = _ids(options)
    text = None if resolv_conf is None else resolv_conf.encode()
    where = (-1 if user is None else user.fd, net.fd, text)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            if interpreters.available():
                told = interpreters.packed(launch) + _program(where, ids, words, options)
                fds = [fd for fd in where[:2] if fd >= 0]
                options["pass_fds"] = (*options.get("pass_fds", ()), *fds, theirs.fileno())
                words = _launcher(theirs.fileno())
            else:
                told = b""
                options["preexec_fn"] = _preexec(theirs.fileno(), where, ids, options)
            process = await _create(words, options)

        def wait() -> bytes:
            """Tell the child what to do, and wait until it has executed the program."""
            with contextlib.suppress(OSError):  # the child has ended already, and said why
                ours.sendall(told)
            return b"".join(iter(lambda: ours.recv(4096), b""))

        try:
            said = await threads.run(wait, on_cancel=lambda: _kill(process))
        except BaseException:
            await _end(process)
            raise
    if said:
        await process.communicate()
        raise _error(*marshal.loads(said))
    return process


def _launcher(control: int) -> tuple[Word, ...]:
    command = interpreters.arguments(control, "aiotun-launch")
    return (*(_WITHOUT_CTRL_C if os.path.exists("/bin/sh") else ()), *command)


async def _create(words: Iterable[Word], options: dict[str, Any]) -> asyncio.subprocess.Process:
    """Let asyncio start a process; if this is cancelled meanwhile, end the process.

    asyncio would also end it, but would take the status of a child that has just ended before the
    child watcher does. The child watcher then warns about an unknown child.
    """
    creating = asyncio.create_task(asyncio.create_subprocess_exec(*words, **options))
    try:
        return await asyncio.shield(creating)
    except asyncio.CancelledError:
        await _end(await creating)
        raise


def _ids(options: dict[str, Any]) -> Ids:
    """Remove user and groups from the options. They apply after entering the namespace."""
    user, group, extra = (options.pop(name, None) for name in ("user", "group", "extra_groups"))
    return (
        None if user is None else _id("user", user),
        None if group is None else _id("group", group),
        None if extra is None else [_id("group", each) for each in extra],
    )


def _id(what: str, value: Any) -> int:
    if isinstance(value, str):
        import grp
        import pwd

        return pwd.getpwnam(value).pw_uid if what == "user" else grp.getgrnam(value).gr_gid
    number = operator.index(value)
    # With all 32 bits set, setreuid(2) would leave the ID as it is.
    if not 0 <= number < 2**32 - 1:
        raise ValueError(f"{what} must be a name or an ID of 0 to 4294967294, got {number}")
    return number


def _program(
    where: tuple[int, int, bytes | None], ids: Ids, words: Iterable[Word], options: dict[str, Any]
) -> bytes:
    """Pack what `launch.main` must do; remove the options that only apply to the program."""
    env = options.pop("env", None)
    env = os.environ if env is None else env
    argv = [os.fsencode(word) for word in words]
    program = os.fsencode(options.pop("executable", None) or argv[0])
    paths = [program]
    if not os.path.dirname(program):
        paths = [os.path.join(os.fsencode(folder), program) for folder in os.get_exec_path(env)]
    variables = {os.fsencode(name): os.fsencode(value) for name, value in env.items()}
    if not argv[0]:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    # In the child, execve would fail with a traceback.
    if any(b"\0" in word for word in (program, *argv, *variables, *variables.values())):
        raise ValueError("the program, its arguments and its environment can't have a null byte")
    if any(not name or b"=" in name for name in variables):
        raise ValueError("the name of an environment variable can't be empty or have a '='")
    interruptible = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    return marshal.dumps((*where, ids, interruptible, paths, argv, variables))


def _preexec(
    control: int, where: tuple[int, int, bytes | None], ids: Ids, options: dict[str, Any]
) -> Any:
    own = options.get("preexec_fn")

    def enter() -> None:
        step = "enter"
        try:
            launch.enter(*where)
            step = "become"
            launch.become(ids)
        except OSError as error:
            launch.tell(control, step, error)
            os._exit(127)
        if own is not None:
            own()

    return enter


async def _end(process: asyncio.subprocess.Process) -> None:
    _kill(process)
    await process.communicate()  # closes its pipes too


def _kill(process: asyncio.subprocess.Process) -> None:
    # Don't use process.kill(): it would take the status of a child that has just ended
    # (Popen.send_signal polls), and the child watcher would warn, as `_create` says.
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _error(step: str, code: int, said: str, what: str | bytes | None) -> OSError:
    name = what if what is None else os.fsdecode(what)
    if step == "exec":
        return OSError(code, said, name)
    if step == "become":
        text = f"the program can't have this user, group or extra_groups: {said}"
        return OSError(code, f"{text}; a rootless namespace has only the user who made it")
    text = f"the program could not enter the network namespace: {name}: {said}"
    if code in (errno.EPERM, errno.EACCES) and name and name.startswith("/"):
        text += "; leave out resolv_conf, or allow mounts in user namespaces (AppArmor, seccomp)"
    elif code == errno.ENOENT:
        text += "; leave out resolv_conf, or create that file"
    else:
        text += "; this takes CAP_SYS_ADMIN, or a namespace that this program made"
    return NotPermittedError(code, text)
