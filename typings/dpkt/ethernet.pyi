import builtins

from .arp import ARP
from .dpkt import Packet
from .ip import IP
from .ip6 import IP6

ETH_TYPE_8021Q: int
ETH_TYPE_8021AD: int
ETH_TYPE_IPX: int
ETH_TYPE_MPLS: int
ETH_TYPE_MPLS_MCAST: int

class Ethernet(Packet):
    dst: bytes
    src: bytes
    type: int
    vlan_tags: list[VLANtag8021Q | VLANtagISL]
    mpls_labels: list[MPLSlabel]
    # The first tag's.
    vlanid: int
    priority: int
    cfi: int
    _next_type: int | None
    # One of these is there, by the name of its class, where `data` is of it.
    arp: ARP
    ip: IP
    ip6: IP6
    ipx: Packet

    @classmethod
    def get_type_rev(cls, k: builtins.type[Packet]) -> int: ...

class VLANtag8021Q(Packet):
    pri: int
    cfi: int
    id: int
    type: int

    def as_tuple(self) -> tuple[int, int, int]: ...

class VLANtagISL(Packet):
    pri: int
    id: int

class MPLSlabel(Packet):
    val: int
    exp: int
    s: int
    ttl: int
