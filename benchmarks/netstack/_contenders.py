"""The stacks that are compared, with their commands."""

import contextlib
import sys
from dataclasses import dataclass

from .._contenders import Contender, named
from ..peers import _field
from ..peers._field import Program
from ._install import GO, LWIP, RUST

MTU = 1500  # of all of them; lwIP has no other

_MODULE = (sys.executable, "-m", "benchmarks.netstack.programs")


def _ours(name: str, *options: str) -> Contender:
    return Contender(name, "aiotun", (*_MODULE[:2], f"{_MODULE[2]}.aiotun_stack", *options))


RAW = "aiotun raw"
STACKS = (RAW, "aiotun raw, uvloop", "aiotun split", "gVisor", "smoltcp", "lwIP")
CONTENDERS = named(
    _ours(RAW, "--offload", "raw"),
    _ours("aiotun raw, uvloop", "--offload", "raw", "--uvloop"),
    _ours("aiotun split", "--offload", "split"),
    Contender("gVisor", "gVisor", (str(GO / "stack"),)),
    Contender("smoltcp", "smoltcp", (str(RUST / "stack"),)),
    Contender("lwIP", "lwIP", (*_MODULE[:2], f"{_MODULE[2]}.lwip_stack", str(LWIP))),
)


@dataclass(frozen=True)
class Host:
    """A running contender, the device to it, and an address that it answers for."""

    program: Program
    device: str
    address: str


def host(stack: contextlib.ExitStack, contender: Contender, number: int) -> Host:
    """Start a contender, and give the kernel's side of its device an address."""
    device, near, far = f"stack{number}", f"10.90.{number}.1", f"10.90.{number}.2"
    words = {"smoltcp": (far,), "lwIP": (f"{far}/24", near)}.get(contender.peer, ())
    program = stack.enter_context(_field.running(contender, device, *words))
    _field.configure(device, f"{near}/24")
    program.check()
    return Host(program, device, far)
