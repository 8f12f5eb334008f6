from .dpkt import Packet

class PPPoE(Packet):
    _v_type: int
    code: int
    session: int
    len: int

class PPP(Packet):
    p: int
