"""Adds nf_tables rules that redirect connections to other addresses to a stack's sockets.

pyroute2 has no helper for the expression `tproxy`, so the netlink batch is packed here. nft(8)
would print the table like this; ADDRESS is each of the stack's own, and TUN is its interface::

    table inet aiotun-TUN {
        chain prerouting {
            type filter hook prerouting priority mangle;
            ip daddr ADDRESS accept
            ip6 daddr ADDRESS accept
            iifname TUN meta l4proto tcp tproxy ip to 127.77.0.1:1 accept
            iifname TUN meta l4proto tcp tproxy ip6 to [::1]:1 accept
        }
    }

The kernel takes the whole batch or nothing of it. If no socket waits at the address, `tproxy` ends
its rule, and the packet is routed as if there were no rule.

Source: ``include/uapi/linux/netfilter/nf_tables.h``, ``nfnetlink.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address

from .._kernel import places
from .._kernel.limits import LIMITS, limit_error

__all__ = ["PORT", "RECEIVERS", "NoTproxyError", "intercept", "remove"]

RECEIVERS = {socket.AF_INET: "127.77.0.1", socket.AF_INET6: "::1"}
"""The address of the sockets that receive everything, by family.

Not the wildcard address: that would also receive packets for the stack's own addresses and `PORT`.
"""

PORT = 1
"""The port of these sockets. A server in the namespace can't have it at all addresses at once."""

# netlink.h, nfnetlink.h
_NETLINK_NETFILTER = 12
_NLM_F_REQUEST, _NLM_F_ACK = 0x1, 0x4
_NLM_F_EXCL, _NLM_F_CREATE, _NLM_F_APPEND = 0x200, 0x400, 0x800
_NLMSG_ERROR = 2
_NLA_F_NESTED = 0x8000
_NFNL_MSG_BATCH_BEGIN, _NFNL_MSG_BATCH_END = 16, 17
_NFNL_SUBSYS_NFTABLES = 10
_NFPROTO_INET, _NFPROTO_IPV4, _NFPROTO_IPV6 = 1, 2, 10

# nf_tables.h: messages and the attributes of each
_NFT_MSG_NEWTABLE, _NFT_MSG_DELTABLE, _NFT_MSG_NEWCHAIN, _NFT_MSG_NEWRULE = 0, 2, 3, 6
_NFTA_TABLE_NAME = 1
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME, _NFTA_CHAIN_HOOK = 1, 3, 4
_NFTA_CHAIN_POLICY, _NFTA_CHAIN_TYPE = 5, 7
_NFTA_HOOK_HOOKNUM, _NFTA_HOOK_PRIORITY = 1, 2
_NFTA_RULE_TABLE, _NFTA_RULE_CHAIN, _NFTA_RULE_EXPRESSIONS = 1, 2, 4
_NFTA_LIST_ELEM, _NFTA_EXPR_NAME, _NFTA_EXPR_DATA = 1, 1, 2
_NFTA_DATA_VALUE, _NFTA_DATA_VERDICT, _NFTA_VERDICT_CODE = 1, 2, 1
_NFTA_META_DREG, _NFTA_META_KEY = 1, 2
_NFTA_CMP_SREG, _NFTA_CMP_OP, _NFTA_CMP_DATA = 1, 2, 3
_NFTA_PAYLOAD_DREG, _NFTA_PAYLOAD_BASE, _NFTA_PAYLOAD_OFFSET, _NFTA_PAYLOAD_LEN = 1, 2, 3, 4
_NFTA_IMMEDIATE_DREG, _NFTA_IMMEDIATE_DATA = 1, 2
_NFTA_TPROXY_FAMILY, _NFTA_TPROXY_REG_ADDR, _NFTA_TPROXY_REG_PORT = 1, 2, 3

_NFT_REG_VERDICT, _NFT_REG_1, _NFT_REG_2 = 0, 1, 2
_NFT_META_IIFNAME, _NFT_META_NFPROTO, _NFT_META_L4PROTO = 6, 15, 16
_NFT_CMP_EQ = 0
_NFT_PAYLOAD_NETWORK_HEADER = 1
_NF_INET_PRE_ROUTING = 0
_NF_IP_PRI_MANGLE = -150
_NF_ACCEPT = 1

_IFNAMSIZ = 16
_CHAIN = "prerouting"

# For each family: the kernel's protocol number, and the offset and length of the destination
# address in the IP header.
_FAMILIES = {
    socket.AF_INET: (_NFPROTO_IPV4, 16, 4),
    socket.AF_INET6: (_NFPROTO_IPV6, 24, 16),
}


class NoTproxyError(OSError):
    """This kernel, or what confines this program, has no nf_tables with `tproxy`."""


def intercept(name: str, own: Iterable[IPv4Address | IPv6Address]) -> None:
    """Add the table of one interface. Blocks, about 0.2 ms.

    Call it in a thread that is in the interface's namespace.

    Args:
        name: the interface.
        own: the stack's own addresses; packets to these are not redirected.

    Raises:
        NoTproxyError: the kernel refuses; the text says what is missing.
        ResourceLimitError: the kernel has no memory left.
    """
    table = _table(name)
    hook = _nested(
        _NFTA_CHAIN_HOOK,
        _attribute(_NFTA_HOOK_HOOKNUM, _number(_NF_INET_PRE_ROUTING)),
        _attribute(_NFTA_HOOK_PRIORITY, struct.pack("!i", _NF_IP_PRI_MANGLE)),
    )
    chain = (
        _attribute(_NFTA_CHAIN_TABLE, table)
        + _attribute(_NFTA_CHAIN_NAME, _text(_CHAIN))
        + hook
        + _attribute(_NFTA_CHAIN_TYPE, _text("filter"))
        + _attribute(_NFTA_CHAIN_POLICY, _number(_NF_ACCEPT))
    )
    _send(
        "intercept",
        (_NFT_MSG_NEWTABLE, _NLM_F_CREATE | _NLM_F_EXCL, _attribute(_NFTA_TABLE_NAME, table)),
        (_NFT_MSG_NEWCHAIN, _NLM_F_CREATE, chain),
        *(
            (
                _NFT_MSG_NEWRULE,
                _NLM_F_CREATE | _NLM_F_APPEND,
                _attribute(_NFTA_RULE_TABLE, table)
                + _attribute(_NFTA_RULE_CHAIN, _text(_CHAIN))
                + _nested(_NFTA_RULE_EXPRESSIONS, *expressions),
            )
            for expressions in _rules(name, own)
        ),
    )


def remove(name: str) -> None:
    """Remove the table of one interface. Blocks. Call it in a thread as for `intercept`.

    Raises:
        NoTproxyError: the kernel refuses.
    """
    table = _attribute(_NFTA_TABLE_NAME, _table(name))
    _send("stop intercepting", (_NFT_MSG_DELTABLE, 0, table))


def _rules(name: str, own: Iterable[IPv4Address | IPv6Address]) -> Iterator[list[bytes]]:
    """Yield the expressions of each rule, in the order of the rules."""
    for address in own:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        protocol, offset, length = _FAMILIES[family]
        yield [
            *_meta_is(_NFT_META_NFPROTO, bytes([protocol])),
            _expression(
                "payload",
                _attribute(_NFTA_PAYLOAD_DREG, _number(_NFT_REG_1)),
                _attribute(_NFTA_PAYLOAD_BASE, _number(_NFT_PAYLOAD_NETWORK_HEADER)),
                _attribute(_NFTA_PAYLOAD_OFFSET, _number(offset)),
                _attribute(_NFTA_PAYLOAD_LEN, _number(length)),
            ),
            _compare(address.packed),
            _accept(),
        ]
    for family, (protocol, _, _) in _FAMILIES.items():
        yield [
            *_meta_is(_NFT_META_IIFNAME, os.fsencode(name).ljust(_IFNAMSIZ, b"\0")),
            *_meta_is(_NFT_META_NFPROTO, bytes([protocol])),
            *_meta_is(_NFT_META_L4PROTO, bytes([socket.IPPROTO_TCP])),
            _immediate(_NFT_REG_1, socket.inet_pton(family, RECEIVERS[family])),
            # The register of the address is 16 bytes long, so this is the next one.
            _immediate(_NFT_REG_2, struct.pack("!H", PORT)),
            _expression(
                "tproxy",
                _attribute(_NFTA_TPROXY_FAMILY, _number(protocol)),
                _attribute(_NFTA_TPROXY_REG_ADDR, _number(_NFT_REG_1)),
                _attribute(_NFTA_TPROXY_REG_PORT, _number(_NFT_REG_2)),
            ),
            _accept(),
        ]


# Expressions


def _meta_is(key: int, value: bytes) -> tuple[bytes, bytes]:
    load = _expression(
        "meta",
        _attribute(_NFTA_META_KEY, _number(key)),
        _attribute(_NFTA_META_DREG, _number(_NFT_REG_1)),
    )
    return load, _compare(value)


def _compare(value: bytes) -> bytes:
    return _expression(
        "cmp",
        _attribute(_NFTA_CMP_SREG, _number(_NFT_REG_1)),
        _attribute(_NFTA_CMP_OP, _number(_NFT_CMP_EQ)),
        _nested(_NFTA_CMP_DATA, _attribute(_NFTA_DATA_VALUE, value)),
    )


def _immediate(register: int, value: bytes) -> bytes:
    return _expression(
        "immediate",
        _attribute(_NFTA_IMMEDIATE_DREG, _number(register)),
        _nested(_NFTA_IMMEDIATE_DATA, _attribute(_NFTA_DATA_VALUE, value)),
    )


def _accept() -> bytes:
    verdict = _nested(_NFTA_DATA_VERDICT, _attribute(_NFTA_VERDICT_CODE, _number(_NF_ACCEPT)))
    return _expression(
        "immediate",
        _attribute(_NFTA_IMMEDIATE_DREG, _number(_NFT_REG_VERDICT)),
        _nested(_NFTA_IMMEDIATE_DATA, verdict),
    )


def _expression(name: str, *data: bytes) -> bytes:
    return _nested(
        _NFTA_LIST_ELEM, _attribute(_NFTA_EXPR_NAME, _text(name)), _nested(_NFTA_EXPR_DATA, *data)
    )


# Attributes and messages


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _nested(kind: int, *attributes: bytes) -> bytes:
    return _attribute(kind | _NLA_F_NESTED, b"".join(attributes))


def _number(value: int) -> bytes:
    return struct.pack("!I", value)


def _text(value: str) -> bytes:
    return os.fsencode(value) + b"\0"


def _table(name: str) -> bytes:
    return _text(f"aiotun-{name}")


def _message(
    kind: int, flags: int, sequence: int, family: int, resource: int, body: bytes
) -> bytes:
    body = struct.pack("!BBH", family, 0, resource) + body
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body


def _send(what: str, *messages: tuple[int, int, bytes]) -> None:
    """Send a batch, and wait for the kernel's answer to each message.

    Raises:
        NoTproxyError: the kernel refuses one message, and with it the batch.
    """
    begin = _message(_NFNL_MSG_BATCH_BEGIN, _NLM_F_REQUEST, 0, 0, _NFNL_SUBSYS_NFTABLES, b"")
    end = _message(_NFNL_MSG_BATCH_END, _NLM_F_REQUEST, 0, 0, _NFNL_SUBSYS_NFTABLES, b"")
    batch = [
        _message(
            _NFNL_SUBSYS_NFTABLES << 8 | kind,
            flags | _NLM_F_REQUEST | _NLM_F_ACK,
            number,
            _NFPROTO_INET,
            0,
            body,
        )
        for number, (kind, flags, body) in enumerate(messages, 1)
    ]
    code = 0
    try:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        with places.make_socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as sock:
            sock.setblocking(True)
            # Name the kernel's address explicitly. Otherwise the kernel would also check the
            # capabilities of the helper process that made the socket (see `_link.session`).
            sock.sendto(b"".join((begin, *batch, end)), (0, 0))
            code = _first_error(sock, len(batch))
    except OSError as error:
        code = error.errno or errno.EIO
    if code in LIMITS:
        raise limit_error(code, f"could not {what} by nf_tables")
    if code:
        raise NoTproxyError(code, f"could not {what} by nf_tables: {_reason(code)}")


def _first_error(sock: socket.socket, expected: int) -> int:
    """Read the answers, and return the first error, or 0."""
    answered = 0
    while answered < expected:
        # The answers are there by the time that send returns. If the kernel refuses the batch as a
        # whole, there is only one.
        try:
            answers = sock.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return errno.EPROTO
        while len(answers) >= 20:
            length, kind = struct.unpack_from("=IH", answers)
            if kind == _NLMSG_ERROR:
                (code,) = struct.unpack_from("=i", answers, 16)
                if code:
                    return int(-code)
                answered += 1
            answers = answers[(length + 3) & ~3 :]
    return 0


def _reason(code: int) -> str:
    if code in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
        return "this kernel has no nfnetlink; load its module with 'modprobe nf_tables'"
    if code in (errno.EINVAL, errno.EOPNOTSUPP):
        return (
            "this kernel has no nf_tables, or none for the family inet; load its module with "
            "'modprobe nf_tables'"
        )
    if code == errno.ENOENT:
        return "this kernel's nf_tables has no tproxy; load its module with 'modprobe nft_tproxy'"
    if code == errno.EEXIST:
        return "another program or stack already intercepts at an interface of this name"
    if code in (errno.EPERM, errno.EACCES):
        return "a sandbox or a security module of this machine forbids it"
    return os.strerror(code)
