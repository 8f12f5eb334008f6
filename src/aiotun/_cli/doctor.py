"""``aiotun doctor``: what this user can do on this machine, and how to fix what fails."""

import asyncio
import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import pwd
import re
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import aiotun

from .._kernel.udp import corrupts_full_tails
from . import probe
from .arguments import as_root
from .terminal import BOLD, DIM, GREEN, RED, YELLOW, paint, printable

__all__ = ["Check", "Report", "as_json", "as_lines", "examine"]

_FOLDER, _NODE = "/dev/net", "/dev/net/tun"
_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}  # capability.h
_PYROUTE2 = (0, 9, 3)
_SETTINGS = Path("/proc/sys")
_RECEIVE_BYTES = 4 << 20  # what open_datagrams asks for; it warns below a quarter


@dataclasses.dataclass(frozen=True)
class Check:
    """One check and its result.

    Attributes:
        name: what was checked.
        status: ``"ok"``, ``"no"``, or ``"note"``: it is missing, and aiotun works without it.
        said: what was found.
        fix: the one command, or step, that fixes it.
    """

    name: str
    status: Literal["ok", "no", "note"]
    said: str
    fix: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of all checks, and what follows from them."""

    usable: bool
    user: str
    system: dict[str, str]
    checks: list[Check]
    works: list[Check]


def examine() -> Report:
    """Run all checks."""
    user = _user()
    node = _node()
    driver, may_create = _driver(node)
    private, offloads = _namespaces(node)
    pyroute2 = _package("pyroute2", needed=True)
    checks = [node, driver]
    if offloads is not None:
        checks.append(_offload(offloads))
    checks += [
        _capabilities(),
        _ipv6(),
        private,
        _udp_buffer(),
        _udp_runs(),
        _ping(),
        pyroute2,
        _package("dpkt"),
        _package("uvloop"),
        _speedups(),
    ]
    works = [
        _opening(node, may_create, pyroute2),
        _attaching(node, may_create, pyroute2, user),
        _inside(node, private, pyroute2),
        _listening(),
    ]
    usable = any(each.status == "ok" for each in works[:3])
    system = {
        "aiotun": _version("aiotun") or "(not installed)",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
    }
    return Report(usable, user, system, checks, works)


# --- The checks ----------------------------------------------------------------------------------


def _root(command: str) -> str:
    """Return a command that needs root as this user must type it."""
    return command if os.geteuid() == 0 else f"sudo {command}"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


def _replace(path: str) -> str:
    """Return the command that replaces what is at a path with the driver's node."""
    remove = "rmdir" if os.path.isdir(path) else "rm"
    script = f"{remove} {path} && mkdir -p {_FOLDER} && mknod -m 0666 {_NODE} c 10 200"
    return _root(f"sh -c '{script}'")


def _node() -> Check:
    try:
        found = os.stat(_NODE)
    except FileNotFoundError:
        fix = _root("modprobe tun")
        fix += f" (for a container: run it with '--device {_NODE}')"
        return Check("node", "no", f"{_NODE} does not exist", fix)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            return Check("node", "no", f"can't check {_NODE}: {error.strerror}")
        text = f"{_NODE} is not the TUN driver's node: {error.strerror}"
        return Check("node", "no", text, _replace(_NODE if error.errno == errno.ELOOP else _FOLDER))
    mode = stat.S_IMODE(found.st_mode)
    if stat.S_ISDIR(found.st_mode):
        fix = _replace(_NODE)
        fix += f" (for a container: pass it in with '--device {_NODE}', not as a volume)"
        return Check("node", "no", f"{_NODE} is a directory", fix)
    if not stat.S_ISCHR(found.st_mode) or found.st_rdev != os.makedev(10, 200):
        text = f"{_NODE} is not the TUN driver's node, character device 10:200"
        return Check("node", "no", text, _replace(_NODE))
    if (place := probe.nodev_mount()) is not None:
        text = f"{_NODE} is on a filesystem that is mounted 'nodev', so it can't be opened"
        return Check("node", "no", text, _root(f"mount -o remount,bind,dev {place}"))
    if not os.access(_NODE, os.R_OK | os.W_OK, effective_ids=True):
        text = f"{_NODE} has mode {mode:04o}, so this user can't open it"
        return Check("node", "no", text, _root(f"chmod 0666 {_NODE}"))
    return Check("node", "ok", f"{_NODE}, mode {mode:04o}")


def _driver(node: Check) -> tuple[Check, bool]:
    """Check the driver, and whether it lets this user create a device in this namespace."""
    try:
        may_create = probe.may_create()
        features = probe.features()
    except aiotun.DeviceMismatchError:
        return Check("driver", "note", "reports no features, like gVisor's driver"), may_create
    except (aiotun.AiotunError, OSError) as error:
        if node.status != "ok":
            return Check("driver", "note", "not checked: its node can't be opened"), False
        if isinstance(error, aiotun.NotPermittedError):  # a container's rules for devices
            return Check("driver", "no", *_text_and_fix(error)), False
        return Check("driver", "no", _text(error), _root("modprobe tun")), False
    return Check("driver", "ok", " ".join(features)), may_create


def _offload(offloads: list[str]) -> Check:
    said = ", ".join(offloads) or "none"
    if "USO" in offloads:
        return Check("offload", "ok", said)
    if not offloads:
        return Check("offload", "note", "none, like gVisor's driver")
    return Check("offload", "note", f"{said}; no USO (UDP), which needs Linux 6.2")


def _capabilities() -> Check:
    words = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    held = int(words[1], 16) if words else 0
    names = [name for name, bit in _CAPABILITIES.items() if held >> bit & 1]
    said = ", ".join(names) or "none that aiotun could use"
    with contextlib.suppress(OSError):
        if Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]:
            said += " (in a user namespace)"
    return Check("capabilities", "ok" if "CAP_NET_ADMIN" in names else "note", said)


def _ipv6() -> Check:
    """Check whether a new interface of this namespace gets IPv6. Many containers switch it off."""
    try:
        off = (_SETTINGS / "net/ipv6/conf/default/disable_ipv6").read_text().strip() == "1"
    except OSError:
        return Check("IPv6", "note", "missing in this kernel, or disabled by ipv6.disable=1")
    if not off:
        return Check("IPv6", "ok", "on for new interfaces")
    fix = _root("sysctl -w net.ipv6.conf.all.disable_ipv6=0")
    fix += " (for a container: run it with '--sysctl net.ipv6.conf.all.disable_ipv6=0')"
    said = "off for new interfaces (net.ipv6.conf.default.disable_ipv6 = 1)"
    return Check("IPv6", "note", said, fix)


def _namespaces(node: Check) -> tuple[Check, list[str] | None]:
    """Check whether a device can be created in a private network namespace; return its offloads.

    Creating the namespace alone proves too little: where AppArmor restricts user namespaces, they
    can be created, but a process has no capabilities in them.
    """
    with_device = node.status == "ok"
    try:
        helped, offloads = asyncio.run(probe.try_namespace(device=with_device))
    except (aiotun.AiotunError, OSError) as error:
        return Check("namespaces", "no", *_text_and_fix(error)), None
    said = "private ones can be created"
    said += " without root, with a helper process" if helped else ""
    return Check("namespaces", "ok", said), offloads if with_device else None


def _udp_buffer() -> Check:
    """Check how large a receive buffer a UDP socket gets without CAP_NET_ADMIN."""
    name = "UDP buffer"
    try:
        most = int((_SETTINGS / "net/core/rmem_max").read_text())
    except (OSError, ValueError):
        return Check(name, "note", "not checked: this namespace doesn't show net.core.rmem_max")
    said = f"{most >> 10} KiB for receiving (net.core.rmem_max)"
    if most >= _RECEIVE_BYTES >> 2:
        return Check(name, "ok", said)
    fix = _root(f"sysctl -w net.core.rmem_max={_RECEIVE_BYTES}")
    return Check(name, "note", f"{said}; a tunnel over UDP loses bursts", fix)


def _udp_runs() -> Check:
    name = "UDP runs"
    if not corrupts_full_tails(platform.release()):
        return Check(name, "ok", "not known to be corrupted by this kernel")
    said = "Linux 7.0 to 7.1.4 corrupt runs of datagrams (UDP_SEGMENT); aiotun sends few of them"
    return Check(name, "note", said, "install Linux 7.1.5 or later")


def _ping() -> Check:
    if found := shutil.which("ping"):
        return Check("ping", "ok", found)
    return Check("ping", "note", "not installed; the demo uses the kernel's ICMP socket instead")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, *, needed: bool = False) -> Check:
    version = _version(name)
    if version is None:
        try:
            __import__(name)
        except ImportError:
            if needed:
                fix = f"python -m pip install '{name}>={'.'.join(map(str, _PYROUTE2))}'"
                return Check(name, "no", "not installed, but required", fix)
            fix = f"python -m pip install 'aiotun[{name}]'"
            return Check(name, "note", "not installed, but optional", fix)
        version = "(unknown version)"
    numbers = tuple(int(each) for each in re.findall(r"\d+", version)[:3])
    if needed and numbers and numbers < _PYROUTE2:
        fix = f"python -m pip install '{name}>={'.'.join(map(str, _PYROUTE2))}'"
        return Check(name, "no", f"{version} is too old", fix)
    return Check(name, "ok", version)


def _speedups() -> Check:
    if probe.SPEEDUPS:
        return Check("C module", "ok", "in use")
    if os.environ.get("AIOTUN_SPEEDUPS") == "forbid":
        return Check("C module", "note", "disabled by AIOTUN_SPEEDUPS=forbid")
    # --no-binary: where only the wheel without the module fits, pip would install that again.
    pip = "python -m pip install --force-reinstall --no-binary aiotun aiotun"
    fix = f"AIOTUN_SPEEDUPS=require {pip}"
    return Check("C module", "note", "not in use; receiving takes a third longer", fix)


# --- What this user can do -----------------------------------------------------------------------


def _opening(node: Check, may_create: bool, pyroute2: Check) -> Check:
    name = "create a device"
    if node.status != "ok" or pyroute2.status != "ok":
        return Check(name, "no", "fix the above first")
    if may_create:
        return Check(name, "ok", "in this network namespace")
    fix = "run the program as root, or with CAP_NET_ADMIN"
    return Check(name, "no", "needs CAP_NET_ADMIN in this network namespace", fix)


def _attaching(node: Check, may_create: bool, pyroute2: Check, user: str) -> Check:
    name = "attach to a device"
    if node.status != "ok" or pyroute2.status != "ok":
        return Check(name, "no", "fix the above first")
    try:
        devices = asyncio.run(aiotun.list_devices())
    except (aiotun.AiotunError, OSError) as error:
        return Check(name, "no", _text(error))
    open_to_us = [each.name for each in devices if may_create or _is_ours(each)]
    free = [each.name for each in devices if each.name in open_to_us and _has_room(each)]
    if free:
        return Check(name, "ok", ", ".join(sorted(free)))
    if may_create:
        return Check(name, "note", "this network namespace has none")
    fix = _root(f"ip tuntap add dev tun0 mode tun user {user}")
    if open_to_us:
        held = ", ".join(sorted(open_to_us))
        return Check(name, "note", f"already in use by another program: {held}", fix)
    return Check(name, "note", f"no device is prepared for {user}", fix)


def _is_ours(device: "aiotun.TunTapInfo") -> bool:
    """As tun_not_capable in drivers/net/tun.c: an owner and a group, where set, must both match."""
    groups = {os.getegid(), *os.getgroups()}
    return (device.owner is None or device.owner == os.geteuid()) and (
        device.group is None or device.group in groups
    )


def _has_room(device: "aiotun.TunTapInfo") -> bool:
    return device.multi_queue or not device.attached


def _inside(node: Check, private: Check, pyroute2: Check) -> Check:
    name = "private device"
    if node.status != "ok" or pyroute2.status != "ok":
        return Check(name, "no", "fix the above first")
    if private.status == "ok":
        said = "in a private namespace, as by 'aiotun demo' or aiotun.new_namespace()"
        return Check(name, "ok", said)
    return Check(name, "no", "needs a private namespace; fix that first, see above")


def _listening() -> Check:
    name = "capture packets"
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).close()
    except OSError:
        return Check(name, "note", "'aiotun dump IFACE' needs CAP_NET_RAW", as_root("dump IFACE"))
    return Check(name, "ok", "'aiotun dump IFACE'")


def _text(error: Exception) -> str:
    return _text_and_fix(error)[0]


def _text_and_fix(error: Exception) -> tuple[str, str]:
    """Split an error's text into what happened and what to do."""
    text, _, fix = str(getattr(error, "strerror", None) or error).partition("; ")
    command = re.fullmatch(r"'(.*)' allows it", fix)
    return (
        text.removeprefix("a private network namespace can't be made: "),
        command[1] if command else fix,
    )


# --- Output --------------------------------------------------------------------------------------


def as_json(report: Report) -> str:
    """Return the report as one JSON object."""
    shown: dict[str, Any] = dataclasses.asdict(report)
    return json.dumps(shown, indent=2)


def as_lines(report: Report, *, colour: bool) -> Iterator[str]:
    """Yield the report as lines for a person to read."""
    system = report.system
    yield paint(
        f"aiotun {system['aiotun']}, Python {system['python']}, Linux {system['kernel']} "
        f"({system['machine']})",
        BOLD,
        colour,
    )
    yield ""
    yield from _rows(report.checks, {"ok": "ok", "no": "no", "note": "--"}, colour)
    yield ""
    yield paint(f"What user {report.user} can do here:", BOLD, colour)
    yield ""
    yield from _rows(report.works, {"ok": "yes", "no": "no", "note": "no"}, colour)
    yield ""
    if report.usable:
        yield paint("aiotun can be used here.", GREEN, colour)
    else:
        yield paint("aiotun can't be used here.", RED, colour)


def _rows(checks: Iterable[Check], words: dict[str, str], colour: bool) -> Iterator[str]:
    colours = {"ok": GREEN, "no": RED, "note": YELLOW}
    for check in checks:
        word = paint(f"{words[check.status]:<3}", colours[check.status], colour)
        yield f"  {word}  {check.name:<18}  {printable(check.said)}"
        if check.fix is not None:
            yield f"{'':27}{paint(f'-> {check.fix}', DIM, colour)}"
