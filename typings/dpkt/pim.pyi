from .dpkt import Packet

class PIM(Packet):
    sum: int
