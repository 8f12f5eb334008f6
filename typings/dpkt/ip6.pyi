from .dpkt import Packet
from .icmp import ICMP
from .icmp6 import ICMP6
from .ip import IP
from .tcp import TCP
from .udp import UDP

EXT_HDRS: list[int]

class IP6(Packet):
    v: int
    fc: int
    flow: int
    plen: int
    nxt: int
    hlim: int
    src: bytes
    dst: bytes
    p: int  # the payload's protocol; only where it was decoded
    extension_hdrs: dict[int, IP6ExtensionHeader]
    all_extension_headers: list[IP6ExtensionHeader]
    # One of these is there, by the name of its class, where `data` is of it.
    icmp: ICMP
    icmp6: ICMP6
    ip: IP
    ip6: IP6
    tcp: TCP
    udp: UDP

class IP6ExtensionHeader(Packet):
    nxt: int
    len: int
    length: int

class IP6OptsHeader(IP6ExtensionHeader): ...
class IP6HopOptsHeader(IP6OptsHeader): ...
class IP6DstOptsHeader(IP6OptsHeader): ...

class IP6RoutingHeader(IP6ExtensionHeader):
    type: int
    segs_left: int
    addresses: list[bytes]

class IP6FragmentHeader(IP6ExtensionHeader):
    frag_off: int
    m_flag: int
    id: int

class IP6AHHeader(IP6ExtensionHeader):
    spi: int
    seq: int
    auth_data: bytes

class IP6ESPHeader(IP6ExtensionHeader):
    spi: int
    seq: int
