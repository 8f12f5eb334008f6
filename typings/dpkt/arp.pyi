from .dpkt import Packet

class ARP(Packet):
    hrd: int
    pro: int
    hln: int
    pln: int
    op: int
    sha: bytes
    spa: bytes
    tha: bytes
    tpa: bytes
