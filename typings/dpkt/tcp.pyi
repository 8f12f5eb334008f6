from .dpkt import Packet

TH_FIN: int
TH_SYN: int
TH_RST: int
TH_PUSH: int
TH_ACK: int

class TCP(Packet):
    sport: int
    dport: int
    seq: int
    ack: int
    _off_flags: int
    off: int
    flags: int
    win: int
    sum: int
    urp: int
    opts: bytes
