"""TCP's maximum segment size, for networks behind a tunnel."""

__all__ = ["clamp_mss", "clamped"]


def clamped(packets: list[bytes], mtu: int) -> list[bytes]:
    """Apply `clamp_mss` to each TCP packet. Each packet must have a whole IPv4 or IPv6 header."""
    return [
        clamp_mss(each, mtu) if each[9 if each[0] < 0x60 else 6] == 6 else each for each in packets
    ]


def clamp_mss(packet: bytes, mtu: int) -> bytes:
    """Lower the MSS option of a TCP SYN to what fits the MTU, for networks behind the tunnel.

    Their hosts don't know our MTU, and many never receive the ICMP messages that would tell them.
    """
    v4 = packet[0] >> 4 == 4
    start = (packet[0] & 15) * 4 if v4 else 40
    if packet[9 if v4 else 6] != 6 or len(packet) < start + 20 or not packet[start + 13] & 2:
        return packet
    if v4 and (packet[6] & 0x1F or packet[7]):  # a later fragment
        return packet
    most = mtu - (40 if v4 else 60)
    end = min(start + (packet[start + 12] >> 4) * 4, len(packet))
    place = start + 20
    while place + 1 < end and packet[place]:
        if packet[place] == 1:
            place += 1
            continue
        mss = int.from_bytes(packet[place + 2 : place + 4], "big")
        if packet[place] == 2 and packet[place + 1] == 4 and place + 4 <= end and mss > most:
            changed = bytearray(packet)
            changed[place + 2 : place + 4] = most.to_bytes(2, "big")
            # RFC 1624: update the checksum. At an odd place, swap the bytes of the words.
            old, new = (mss, most) if place % 2 == 0 else (_turn(mss), _turn(most))
            total = (int.from_bytes(packet[start + 16 : start + 18], "big") ^ 0xFFFF) + new
            total += old ^ 0xFFFF
            total = (total & 0xFFFF) + (total >> 16)
            total = (total & 0xFFFF) + (total >> 16)
            changed[start + 16 : start + 18] = (total ^ 0xFFFF).to_bytes(2, "big")
            return bytes(changed)
        place += max(2, packet[place + 1])
    return packet


def _turn(word: int) -> int:
    return (word & 0xFF) << 8 | word >> 8
