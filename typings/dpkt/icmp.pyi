from .dpkt import Packet

class ICMP(Packet):
    type: int
    code: int
    sum: int

    class Echo(Packet):
        id: int
        seq: int

    class Quote(Packet): ...
    class Unreach(Quote): ...
    class TimeExceed(Quote): ...
