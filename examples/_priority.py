"""Frames with a VLAN tag that has only a priority: VLAN 0, the network itself (IEEE 802.1Q)."""

__all__ = ["tagged", "untagged"]

_VLAN_TAGS = (b"\x81\x00", b"\x88\xa8")  # 802.1Q and 802.1ad


def untagged(frame: bytes) -> tuple[bytes, bytes]:
    """Take such a tag off: the frame without it, and the tag, which is empty if there is none."""
    tag = frame[12:16]
    if len(tag) < 4 or tag[:2] not in _VLAN_TAGS or tag[2] & 0xF or tag[3]:
        return frame, b""
    return frame[:12] + frame[16:], tag


def tagged(frame: bytes, tag: bytes) -> bytes:
    """Put it into an answer."""
    return frame[:12] + tag + frame[12:]
