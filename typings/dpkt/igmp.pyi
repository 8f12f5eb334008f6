from .dpkt import Packet

class IGMP(Packet):
    sum: int
