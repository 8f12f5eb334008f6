from .dpkt import Packet

class SCTP(Packet):
    sum: int
