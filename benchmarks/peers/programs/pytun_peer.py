"""python-pytun, with blocking calls, as its documentation shows it."""

from collections.abc import Callable

import pytun

from ._contract import ADDRESS, MTU, NETMASK, READ_SIZE, serve


class Device:
    def __init__(self, name: str) -> None:
        self._tun = pytun.TunTapDevice(name=name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
        self.write = self._tun.write

    def read(self) -> bytes:
        packet: bytes = self._tun.read(READ_SIZE)
        return packet


def configured(name: str) -> Callable[[], object]:
    tun = pytun.TunTapDevice(name=name, flags=pytun.IFF_TUN | pytun.IFF_NO_PI)
    tun.addr, tun.netmask, tun.mtu = ADDRESS, NETMASK, MTU
    tun.up()
    close: Callable[[], object] = tun.close
    return close


if __name__ == "__main__":
    serve(Device, configured=configured)
