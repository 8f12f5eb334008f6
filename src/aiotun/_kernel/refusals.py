"""Explains why the kernel refuses a private network namespace, and what would allow it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import NotPermittedError

__all__ = ["Refusal", "explain", "find"]

_SETTINGS = Path("/proc/sys")


class Refusal(NamedTuple):
    """What forbids the namespace, and what allows it.

    Attributes:
        said: one sentence without a period.
        fix: a command if `is_command`, otherwise a sentence that says what to do.
    """

    said: str
    fix: str
    is_command: bool = False


def explain(step: str, code: int) -> NotPermittedError:
    """Make the error for the step that failed.

    Args:
        step: ``"user"`` (making a user namespace), ``"map"`` (its users), ``"net"`` (making a
            network namespace), ``"bare"`` (making a network namespace without a user namespace), or
            ``"mount"`` (making a mount namespace).
        code: the errno.
    """
    refusal = find(step, code)
    fix = f"'{refusal.fix}' allows it" if refusal.is_command else refusal.fix
    return NotPermittedError(
        code, f"a private network namespace can't be made: {refusal.said}; {fix}"
    )


def find(step: str, code: int) -> Refusal:
    """Find out what forbids the namespace; the arguments are those of `explain`."""
    if code == errno.ENOSPC:
        return _limit(
            "user.max_net_namespaces" if step in ("net", "bare") else "user.max_user_namespaces"
        )
    if code in (errno.EINVAL, errno.ENOSYS):
        kind, option = ("network", "NET_NS") if step in ("net", "bare") else ("user", "USER_NS")
        return Refusal(
            f"this kernel has no {kind} namespaces ({os.strerror(code)})",
            f"use one with CONFIG_{option}",
        )
    if code not in (errno.EPERM, errno.EACCES):
        return Refusal(f"the kernel says '{os.strerror(code)}'", "look at the kernel's log (dmesg)")
    if step == "bare":
        return Refusal(
            "without a user namespace it needs CAP_SYS_ADMIN and CAP_NET_ADMIN",
            "run as root, or leave out rootless=False",
        )
    if _setting("kernel.unprivileged_userns_clone") == "0" and step == "user":
        return Refusal(
            "kernel.unprivileged_userns_clone = 0 keeps ordinary users from user namespaces",
            *_sysctl("kernel.unprivileged_userns_clone", 1),
        )
    if step == "map" and os.geteuid() == 0 and not _may_map_root():
        return Refusal(
            "root without CAP_SETFCAP may make no user namespace in which it is root, too",
            "run the program as another user, or give it the capability "
            "(in Docker '--cap-add SETFCAP')",
        )
    if step != "user" or code == errno.EACCES:
        return _security_module(step)
    if _filtered():
        return Refusal(
            "a seccomp filter forbids user namespaces, as Docker's default filter does",
            "run the container with '--security-opt seccomp=PROFILE', with a profile that allows "
            "unshare and setns, or the service without RestrictNamespaces",
        )
    return Refusal(
        "the kernel forbids user namespaces to this program, as it does after a chroot",
        "start it outside the chroot, or as root",
    )


def _limit(name: str) -> Refusal:
    value = _setting(name)
    kind = "network" if "net" in name else "user"
    if value == "0":
        return Refusal(f"{name} = 0 allows no {kind} namespaces", *_sysctl(name, 10_000))
    # Each user namespace around this one has a limit, too, which this program can't read.
    known = f"the limit {name} = {value}" if value else f"the limit {name}"
    return Refusal(
        f"{known}, or that of a namespace around this one, is used up",
        "close other namespaces, or let root raise it: "
        f"'sysctl -w {name}=...', also outside of this container",
    )


def _security_module(step: str) -> Refusal:
    """Explain what a security module or a seccomp filter forbids.

    Ubuntu's AppArmor allows user namespaces, but takes the capabilities in them away.
    """
    setting = "kernel.apparmor_restrict_unprivileged_userns"
    if _setting(setting) == "1":
        return Refusal(
            f"AppArmor takes the capabilities away in user namespaces ({setting} = 1)",
            f"'{_sysctl(setting, 0)[0]}' allows it to all programs, and an AppArmor profile with "
            "'userns,' to this one",
        )
    what = "user namespaces" if step == "user" else "capabilities in user namespaces"
    return Refusal(
        f"a security module (AppArmor, SELinux) or a seccomp filter forbids {what}",
        "look into the kernel's log (dmesg, ausearch -m AVC) for the rule, and allow it there",
    )


def _filtered() -> bool:
    """Whether a seccomp filter applies to this thread (proc(5): mode 2)."""
    return _status("Seccomp") == "2"


def _may_map_root() -> bool:
    """Whether this thread has CAP_SETFCAP (31), needed since Linux 5.12; True if unknown."""
    effective = _status("CapEff")
    return effective is None or bool(int(effective, 16) >> 31 & 1)


def _status(field: str) -> str | None:
    """Give a field of this thread's status (proc(5))."""
    try:
        lines = Path("/proc/thread-self/status").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)


def _setting(name: str) -> str | None:
    try:
        return (_SETTINGS / name.replace(".", "/")).read_text().strip()
    except OSError:
        return None


def _sysctl(name: str, value: int) -> tuple[str, bool]:
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}sysctl -w {name}={value}", True
