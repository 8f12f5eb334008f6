from .dpkt import Packet
from .icmp import ICMP
from .icmp6 import ICMP6
from .ip6 import IP6
from .tcp import TCP
from .udp import UDP

class IP(Packet):
    v: int
    hl: int
    tos: int
    len: int
    id: int
    rf: int
    df: int
    mf: int
    offset: int
    ttl: int
    p: int
    sum: int
    src: bytes
    dst: bytes
    opts: bytes
    # One of these is there, by the name of its class, where `data` is of it.
    icmp: ICMP
    icmp6: ICMP6
    ip: IP
    ip6: IP6
    tcp: TCP
    udp: UDP
