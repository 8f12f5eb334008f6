from .dpkt import Packet

class OSPF(Packet):
    sum: int
