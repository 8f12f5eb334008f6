"""Why a private namespace can't be had: each cause is told apart, with what allows it."""

import errno
import os
from pathlib import Path

import pytest

from aiotun._kernel import refusals


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /proc/sys of the test's own, and no seccomp filter."""
    monkeypatch.setattr(refusals, "_SETTINGS", tmp_path)
    monkeypatch.setattr(refusals, "_filtered", lambda: False)
    monkeypatch.setattr(refusals, "_may_map_root", lambda: True)
    return tmp_path


def put(settings: Path, name: str, value: str) -> None:
    path = settings / name.replace(".", "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value + "\n")


APPARMOR = ("kernel.apparmor_restrict_unprivileged_userns", "1")


@pytest.mark.parametrize(
    ("step", "code", "setting", "said", "fix"),
    [
        ("user", errno.ENOSPC, ("user.max_user_namespaces", "0"), "= 0 allows no user", "=10000"),
        ("net", errno.ENOSPC, ("user.max_net_namespaces", "0"), "= 0 allows no network", "=10000"),
        ("bare", errno.ENOSPC, ("user.max_net_namespaces", "0"), "allows no network", "=10000"),
        ("net", errno.ENOSPC, ("user.max_net_namespaces", "7"), "= 7, or that of", "close other"),
        (
            "user",
            errno.EPERM,
            ("kernel.unprivileged_userns_clone", "0"),
            "keeps ordinary users",
            "sysctl -w kernel.unprivileged_userns_clone=1",
        ),
        ("map", errno.EPERM, APPARMOR, "AppArmor takes the capabilities away", "userns,"),
        ("map", errno.EACCES, APPARMOR, "AppArmor takes the capabilities away", "userns,"),
        ("net", errno.EPERM, APPARMOR, "AppArmor takes the capabilities away", "userns,"),
        ("user", errno.EACCES, None, "a security module", "dmesg"),
        ("map", errno.EPERM, None, "forbids capabilities in user namespaces", "dmesg"),
        ("user", errno.EPERM, None, "after a chroot", "outside the chroot"),
        ("user", errno.EINVAL, None, "no user namespaces", "CONFIG_USER_NS"),
        ("net", errno.EINVAL, None, "no network namespaces", "CONFIG_NET_NS"),
        ("bare", errno.EPERM, None, "CAP_SYS_ADMIN", "rootless=False"),
        ("user", errno.ENOMEM, None, os.strerror(errno.ENOMEM), "dmesg"),
    ],
)
def test_each_cause_is_told_apart(
    settings: Path, step: str, code: int, setting: tuple[str, str] | None, said: str, fix: str
) -> None:
    if setting is not None:
        put(settings, *setting)
    error = refusals.explain(step, code)
    assert error.errno == code
    assert said in str(error)
    assert fix in str(error)


def test_a_seccomp_filter_is_named(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_filtered", lambda: True)
    assert "a seccomp filter forbids user namespaces" in refusals.find("user", errno.EPERM).said
