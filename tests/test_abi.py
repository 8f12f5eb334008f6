"""Numbers and layouts for every architecture, compared with the kernel's own headers."""

import struct
import subprocess
from pathlib import Path

import pytest

from aiotun._kernel import abi
from aiotun._kernel.abi import Iff, Ioctl, OffloadFlag, number

from .helpers import need

USUAL = ["x86_64", "i686", "armv7l", "aarch64", "riscv64", "s390x", "loongarch64"]
SWAPPED = ["mips", "mips64", "ppc", "ppc64le", "ppc64", "sparc", "sparc64", "alpha"]

POINTER_BITS = struct.calcsize("P") * 8


def numbers(machine: str) -> tuple[int, int, int]:
    """TUNSETIFF, TUNGETIFF and TUNGETDEVNETNS."""
    return (
        number("write", 202, 4, machine),
        number("read", 210, 4, machine),
        number("none", 227, 0, machine),
    )


@pytest.mark.parametrize("machine", USUAL)
def test_ioctl_numbers_of_most_machines(machine: str) -> None:
    assert numbers(machine) == (0x400454CA, 0x800454D2, 0x54E3)


@pytest.mark.parametrize("machine", SWAPPED)
def test_ioctl_numbers_with_13_size_bits(machine: str) -> None:
    assert numbers(machine) == (0x800454CA, 0x400454D2, 0x200054E3)


@pytest.mark.parametrize("machine", ["parisc", "parisc64"])
def test_ioctl_numbers_on_parisc(machine: str) -> None:
    assert numbers(machine) == (0x800454CA, 0x400454D2, 0x54E3)


@pytest.mark.parametrize(
    ("machine", "long", "short"),
    [("x86_64", 0x401054D5, 0x400854D5), ("mips64", 0x801054D5, 0x800854D5)],
)
def test_the_size_of_a_pointer_is_in_the_number(machine: str, long: int, short: int) -> None:
    assert (number("write", 213, 16, machine), number("write", 213, 8, machine)) == (long, short)


def test_ioctl_numbers_of_this_machine() -> None:
    assert number("write", 202, 4) == Ioctl.TUNSETIFF
    assert number("none", 227, 0) == Ioctl.TUNGETDEVNETNS


def test_structures_have_the_kernels_sizes() -> None:
    assert abi.IFREQ.size == abi.IFREQ_SIZE == 40
    assert abi.SOCK_FPROG.size == POINTER_BITS // 4
    assert abi.SOCK_FILTER.size == 8
    assert abi.TUN_FILTER.size == 4
    assert abi.ETHTOOL_DRVINFO.size == 196
    assert (abi.IFNAMSIZ, abi.MAX_QUEUES, abi.PI_SIZE, abi.VNET_HDR_SIZE) == (16, 256, 4, 10)


def test_the_read_size_holds_the_longest_packet() -> None:
    assert abi.READ_SIZE == 65_535 + 14 + 4 + 4 + 24


PROGRAM = r"""
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <net/if.h>
#include <linux/ethtool.h>
#include <linux/filter.h>
#include <linux/if_tun.h>
#include <linux/sockios.h>
#include <linux/virtio_net.h>
#define SHOW(name) printf("%s %lu\n", #name, (unsigned long)(name))
int main(void)
{
@LINES@
    return 0;
}
"""

SIZES = {
    "sizeof(struct sock_fprog)": abi.SOCK_FPROG.size,
    "sizeof(struct sock_filter)": abi.SOCK_FILTER.size,
    "offsetof(struct tun_filter, addr)": abi.TUN_FILTER.size,
    "sizeof(struct tun_pi)": abi.PI_SIZE,
    "sizeof(struct virtio_net_hdr)": abi.VNET_HDR_SIZE,
    "sizeof(struct virtio_net_hdr_mrg_rxbuf)": abi.VNET_HDR_LONG.size,
    "sizeof(struct ethtool_drvinfo)": abi.ETHTOOL_DRVINFO.size,
    "offsetof(struct ethtool_drvinfo, bus_info)": 4 + 3 * 32,
    "offsetof(struct ifreq, ifr_flags)": 16,
    "IFNAMSIZ": abi.IFNAMSIZ,
    "ETHTOOL_GDRVINFO": abi.ETHTOOL_GDRVINFO,
    "SIOCGIFMTU": abi.Siocgif.MTU,
    "SIOCGIFINDEX": abi.Siocgif.INDEX,
    "SIOCETHTOOL": abi.Siocgif.ETHTOOL,
}


def expected() -> dict[str, int]:
    """The expected values, by their C expressions."""
    found = {each.name: int(each) for each in Ioctl}
    found |= {f"IFF_{each.name}": int(each) for each in Iff}
    found |= {f"TUN_F_{each.name}": int(each) for each in OffloadFlag}
    return found | {name: int(value) for name, value in SIZES.items()}


def test_constants_agree_with_the_kernels_headers(tmp_path: Path) -> None:
    compiler = need("cc")
    lines = []
    for name in expected():
        # Older headers lack these; no other constant may be missing.
        optional = name in ("TUN_F_USO4", "TUN_F_USO6", "IFF_NO_CARRIER", "TUNSETCARRIER")
        lines += [f"#ifdef {name}", f"    SHOW({name});", "#endif"] if optional else []
        lines += [] if optional else [f"    SHOW({name});"]
    source, binary = tmp_path / "show.c", tmp_path / "show"
    source.write_text(PROGRAM.replace("@LINES@", "\n".join(lines)))
    done = subprocess.run([compiler, "-o", binary, source], capture_output=True, text=True)
    if "No such file" in done.stderr:
        pytest.skip("missing: the kernel's headers; install linux-libc-dev")
    assert done.returncode == 0, done.stderr
    said = subprocess.run([binary], check=True, capture_output=True, text=True).stdout
    rows = [line.rpartition(" ") for line in said.splitlines()]
    found = {name: int(value) for name, _, value in rows}
    assert len(found) > 40
    assert {name: expected()[name] for name in found} == found
