import builtins

from .arp import ARP
from .dpkt import Packet
from .ip import IP
from .ip6 import IP6

ETH_TYPE_8021Q: int
ETH_TYPE_8021AD: int
ETH_TYPE_MPLS: int

class Ethernet(Packet):
    dst: bytes
    src: bytes
    type: int
    vlan_tags: list[VLANtag8021Q | VLANtagISL]
    mpls_labels: list[MPLSlabel]
    # One of these is there, by the name of its class, where `data` is of it.
    arp: ARP
    ip: IP
    ip6: IP6

    @classmethod
    def get_type_rev(cls, k: builtins.type[Packet]) -> int: ...

class VLANtag8021Q(Packet):
    pri: int
    cfi: int
    id: int
    type: int

class VLANtagISL(Packet): ...

class MPLSlabel(Packet):
    val: int
    exp: int
    s: int
    ttl: int
