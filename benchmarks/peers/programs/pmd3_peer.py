"""pytun-pmd3, pymobiledevice3's pytun in Python, with blocking calls.

It sets only IPv6 addresses, so it can't take part in opening a device with an IPv4 address.
"""

from pytun_pmd3 import TunTapDevice
from pytun_pmd3.linux import IFF_NO_PI, IFF_TUN

from ._contract import READ_SIZE, serve


class Device:
    def __init__(self, name: str) -> None:
        self._tun = TunTapDevice(name=name, flags=IFF_TUN | IFF_NO_PI)
        self.write = self._tun.write

    def read(self) -> bytes:
        packet: bytes = self._tun.read(READ_SIZE)
        return packet


if __name__ == "__main__":
    serve(Device)
