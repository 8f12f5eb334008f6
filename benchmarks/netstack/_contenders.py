"""The stacks and programs that are compared, with their commands."""

import contextlib
import sys
from dataclasses import dataclass

from .._contenders import Contender, named
from .._harness import HERE
from ..peers import _field
from ..peers._field import Program
from ._install import GO, LWIP, RUST, SOURCES, TUN2PROXY

MTU = 1500  # of all of them; lwIP has no other

_EXAMPLES = HERE.parent / "examples"
_MODULE = (sys.executable, "-m", "benchmarks.netstack.programs")
SOCKS = "10.91.0.2:1080"  # where the proxy of `tun2socks` is

# tun2proxy does not say when it is ready.
_TUN2PROXY = (
    'while [ ! -e "/proc/sys/net/ipv4/conf/$0" ]; do sleep 0.05; done && echo "ready $0" & '
    f'exec {TUN2PROXY} --tun "$0" --proxy socks5://{SOCKS} --verbosity off >&2'
)
# It wants to give up root, and to tell a syslog that is not there what then fails.
_PASTA = 'exec pasta --runas 0:0 --config-net --quiet -- "$@" 2>/dev/null'


def _ours(name: str, *options: str) -> Contender:
    return Contender(name, "aiotun", (*_MODULE[:2], f"{_MODULE[2]}.aiotun_stack", *options))


def _example(name: str, *words: str) -> Contender:
    return Contender(name, "aiotun", (sys.executable, *words))


RAW = "aiotun raw"
RUN, TUN2SOCKS, WIREGUARD = "aiotun run", "tun2socks.py", "wireguard --proxy"
STACKS = (RAW, "aiotun raw, uvloop", "aiotun split", "gVisor", "smoltcp", "lwIP")
CONTENDERS = named(
    _ours(RAW, "--offload", "raw"),
    _ours("aiotun raw, uvloop", "--offload", "raw", "--uvloop"),
    _ours("aiotun split", "--offload", "split"),
    Contender("gVisor", "gVisor", (str(GO / "stack"),)),
    Contender("smoltcp", "smoltcp", (str(RUST / "stack"),)),
    Contender("lwIP", "lwIP", (*_MODULE[:2], f"{_MODULE[2]}.lwip_stack", str(LWIP))),
    # Each is followed by the command that it runs.
    _example(RUN, "-m", "aiotun", "run", "--"),
    Contender("pasta", "pasta", ("sh", "-c", _PASTA, "pasta")),
    Contender("slirp4netns", "slirp4netns", ("sh", str(SOURCES / "slirp.sh"))),
    # Each is followed by the name of its device.
    _example(TUN2SOCKS, str(_EXAMPLES / "tun2socks.py"), "--proxy", f"socks5://{SOCKS}", "--name"),
    Contender("tun2proxy", "tun2proxy", ("sh", "-c", _TUN2PROXY)),
    _example(WIREGUARD, str(_EXAMPLES / "wireguard")),
    _example(f"{WIREGUARD}, uvloop", str(_EXAMPLES / "wireguard"), "--uvloop"),
    Contender("wireguard-go's netstack", "wireguard-go", (str(GO / "proxy"),)),
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
