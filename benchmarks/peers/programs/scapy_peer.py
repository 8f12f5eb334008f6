"""scapy's TunTapInterface. Its packets are objects, because that is why people use scapy."""

from typing import Any

from scapy.layers.inet import ICMP, IP
from scapy.layers.tuntap import TunTapInterface

from ._contract import READ_SIZE, serve


class Device:
    def __init__(self, name: str) -> None:
        self._tun = TunTapInterface(name, mode_tun=True, default_read_size=READ_SIZE)
        self.read = self._tun.recv
        self.write = self._tun.send


def reply(packet: Any) -> Any:
    if ICMP not in packet or packet[ICMP].type != 8:
        return None
    packet.src, packet.dst = packet.dst, packet.src
    packet[ICMP].type = 0
    del packet[ICMP].chksum, packet.chksum
    return packet


if __name__ == "__main__":
    serve(Device, reply=reply, make=IP)
