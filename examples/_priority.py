"""Frames with a priority tag: VLAN 0 stands for the untagged network (IEEE 802.1Q)."""

__all__ = ["tagged", "untagged"]

_VLAN_TAGS = (b"\x81\x00", b"\x88\xa8")  # 802.1Q and 802.1ad


def untagged(frame: bytes) -> tuple[bytes, bytes]:
    """Return the frame without its priority tag, and the tag; b"" if it has no such tag."""
    tag = frame[12:16]
    if len(tag) < 4 or tag[:2] not in _VLAN_TAGS or tag[2] & 0xF or tag[3]:
        return frame, b""
    return frame[:12] + frame[16:], tag


def tagged(frame: bytes, tag: bytes) -> bytes:
    """Insert the tag into an answer."""
    return frame[:12] + tag + frame[12:]
