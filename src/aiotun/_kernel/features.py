"""Features of an interface's driver, as ethtool(8) shows them; reading them needs no privilege.

Source: ``include/uapi/linux/ethtool.h``: struct ethtool_sset_info, ethtool_gstrings and
ethtool_gfeatures. The names of the features are in the kernel's ``net/ethtool/common.c``.
"""

from __future__ import annotations

import array
import struct

from . import ioctl

__all__ = ["has_feature"]

_GSTRINGS, _GSSET_INFO, _GFEATURES = 0x1B, 0x37, 0x3A
_SS_FEATURES = 4  # enum ethtool_stringset
_NAME = 32  # ETH_GSTRING_LEN


def has_feature(name: str, feature: str) -> bool | None:
    """ETHTOOL_GFEATURES: return whether a feature of an interface's driver can be switched on.

    Args:
        name: an interface in this thread's network namespace.
        feature: the name that ``ethtool -k`` shows, for example ``"tx-udp-segmentation"``.

    Returns:
        None if this is unknown: there is no such interface, or the kernel (gVisor, for example)
        doesn't have this request.

    Raises:
        ResourceLimitError: no file descriptor is left for the request.
    """
    try:
        info = _ask(name, struct.pack("=IIQI", _GSSET_INFO, 0, 1 << _SS_FEATURES, 0))
        (count,) = struct.unpack_from("=I", info, 16)
        strings = _ask(name, struct.pack("=III", _GSTRINGS, _SS_FEATURES, count), count * _NAME)
        names = [
            strings[at : at + _NAME].rstrip(b"\0").decode()
            for at in range(12, 12 + count * _NAME, _NAME)
        ]
        if feature not in names:
            return False  # a kernel older than the feature
        word, bit = divmod(names.index(feature), 32)
        words = (count + 31) // 32
        # Each block has four words: available, requested, active, never_changed.
        found = _ask(name, struct.pack("=II", _GFEATURES, words), words * 16)
    except OSError:
        return None
    return bool(struct.unpack_from("=I", found, 8 + word * 16)[0] >> bit & 1)


def _ask(name: str, request: bytes, room: int = 0) -> bytes:
    data = array.array("B", request + bytes(room))
    ioctl.ask_ethtool(name, data)
    return data.tobytes()
