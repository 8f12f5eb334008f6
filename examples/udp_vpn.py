#!/usr/bin/env python3
"""An encrypted tunnel over UDP: a VPN that is as short as possible and still safe to use.

    python examples/udp_vpn.py key alice 10.8.0.2 fd08::2 >> keys     # append a line for a client

    sudo python examples/udp_vpn.py server --key keys --address 10.8.0.1/24 --address fd08::1/64 \\
        --bind 0.0.0.0:4500
    sudo python examples/udp_vpn.py client --key alice.key --address 10.8.0.2/24 \\
        --address fd08::2/64 --connect vpn.example.org:4500

A line of the key file has a client's name, its addresses in the tunnel and its key. The server's
file has a line for each client; a client's file has its own line. Prints "ready NAME" when it
serves, prints the counts of dropped packets on stderr at SIGUSR1, and ends cleanly on SIGINT and
SIGTERM. Needs `cryptography` (pip install 'aiotun[examples]').

The messages (|| means concatenation):

    HELLO    1 || client id (8) || nonce (23) || MAC (16)
    WELCOME  2 || client id (8) || session (7) || nonce (16) || MAC (16), which covers the HELLO
    DATA     3 || session (7) || counter (8) || sealed packet and tag; empty is a keepalive

HKDF derives a key for each direction from the client's key and both nonces. A counter is never used
twice with a key. The server uses a new session only after it has received data in it, so replaying
an old HELLO achieves nothing. No answer is larger than its request, so the server can't be used to
amplify a flood; this is why the nonce of the HELLO is longer.

docs/how-to/udp_vpn.md says what the tunnel does not protect against.
"""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import hmac
import os
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from _addresses import with_prefix
from _mss import clamped
from _running import BATCH, QUEUE, run, until_signal
from _tunnel import RECEIVE_BYTES, deliver, report, resolve, send, send_now
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import aiotun
from aiotun import DatagramSocket
from aiotun.datagrams import Address

HELLO, WELCOME, DATA = b"\1", b"\2", b"\3"
HEAD_BYTES, TAG_BYTES = 16, 16
HELLO_BYTES = WELCOME_BYTES = 48

WINDOW = 4096  # how far packets may be reordered
RENEW_SECONDS = 600.0
LAST_COUNTER = 2**36  # far below the limit of either cipher; sessions are renewed long before
RETRY_SECONDS = 1.0
SILENT_KEEPALIVES = 3  # after so many without an answer, the server has lost the session

CIPHERS: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    "aes-256-gcm": AESGCM,
    "chacha20-poly1305": ChaCha20Poly1305,
}
_COUNTER = struct.Struct("!Q")
_ZEROS = bytes(4)


# --- Keys and sessions ---------------------------------------------------------------------------


@dataclass
class Client:
    """A line of the key file, and the server's state of that client."""

    name: str
    addresses: list[bytes]
    key: bytes
    current: "Session | None" = None
    previous: "Session | None" = None
    # Sessions that are not confirmed yet. Several, so that a replayed HELLO does not displace the
    # client's real one.
    offered: "deque[Session]" = field(default_factory=lambda: deque(maxlen=4))
    where: "tuple[DatagramSocket, Address] | None" = None

    @property
    def id(self) -> bytes:
        return hashlib.blake2s(self.key, person=b"vpn id", digest_size=8).digest()


def read_keys(path: Path) -> list[Client]:
    """Read a key file; raises ValueError and OSError."""
    clients: list[Client] = []
    # Only a newline ends a line, and a comment may be in any encoding.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        words = line.partition(b"#")[0].decode("utf-8", "backslashreplace").split()
        if not words:
            continue
        try:
            name, *addresses, text = words
            key = base64.b64decode(text, validate=True)
            if len(key) != 32 or not addresses:
                raise ValueError
            clients.append(Client(name, [ip_address(each).packed for each in addresses], key))
        except ValueError:  # its text might show a key
            raise ValueError(f"{path}: line {number} is not NAME ADDRESS... KEY") from None
    taken = [address for client in clients for address in client.addresses]
    if not clients or len(set(taken)) < len(taken):
        raise ValueError(f"{path}: {'an address is there twice' if clients else 'no keys'}")
    return clients


def mac(key: bytes, *parts: bytes) -> bytes:
    return hashlib.blake2s(b"".join(parts), key=key, person=b"vpn mac", digest_size=16).digest()


class Session:
    """A key for each direction, a counter, and the received counters.

    Args:
        index: the 7 bytes that identify the session at both ends.
        secret: 64 bytes: the key to the server, and the key to the client.
    """

    def __init__(self, index: bytes, secret: bytes, cipher: str, server: bool, now: float) -> None:
        keys = [CIPHERS[cipher](secret[:32]), CIPHERS[cipher](secret[32:])]
        self._decrypt, self._encrypt = keys[not server].decrypt, keys[server].encrypt
        self.index = index
        self._head = DATA + index
        self._sent = 0
        self._next = 0  # one above the highest counter received
        self._seen = bytearray(WINDOW)
        self.began = now

    def seal(self, packets: list[bytes], dropped: Counter[str]) -> list[bytes]:
        if self._sent + len(packets) > LAST_COUNTER:
            dropped["no session"] += len(packets)
            return []
        head, encrypt, pack, zeros = self._head, self._encrypt, _COUNTER.pack, _ZEROS
        messages: list[bytes] = []
        for counter, packet in enumerate(packets, self._sent):
            number = pack(counter)
            messages.append(head + number + encrypt(zeros + number, packet, head))
        self._sent += len(packets)
        return messages

    def open(self, messages: Iterable[bytes], dropped: Counter[str]) -> tuple[list[bytes], bool]:
        """Return the genuine and new packets, and whether the newest so far is among them."""
        head, decrypt, accept = self._head, self._decrypt, self._accept
        packets: list[bytes] = []
        before = self._next
        for message in messages:
            number = message[8:16]
            try:
                packet = decrypt(_ZEROS + number, message[16:], head)
            except InvalidTag:
                dropped["forged"] += 1
                continue
            if accept(_COUNTER.unpack(number)[0]):
                packets.append(packet)
            else:
                dropped["replayed"] += 1
        return packets, self._next > before

    def _accept(self, counter: int) -> bool:
        ahead = counter - self._next
        if ahead >= 0:
            for skipped in range(max(self._next, counter - WINDOW), counter):
                self._seen[skipped % WINDOW] = 0
            self._next = counter + 1
        elif ahead < -WINDOW or self._seen[counter % WINDOW]:
            return False
        self._seen[counter % WINDOW] = 1
        return True


def agree(key: bytes, hello: bytes, welcome: bytes, cipher: str) -> bytes:
    """Derive a session's keys from the client's key and the nonces of both."""
    said = hashlib.sha256(hello + welcome[:-16]).digest()
    info = b"aiotun udp_vpn 1 " + cipher.encode()
    return HKDF(SHA256(), length=64, salt=said, info=info).derive(key)


def make_hello(client: Client) -> bytes:
    said = HELLO + client.id + os.urandom(23)
    return said + mac(client.key, said)


def make_welcome(client: Client, hello: bytes, index: bytes) -> bytes:
    said = WELCOME + client.id + index + os.urandom(16)
    return said + mac(client.key, hello, said)


def genuine(client: Client, message: bytes, before: bytes = b"") -> bool:
    return hmac.compare_digest(message[-16:], mac(client.key, before, message[:-16]))


# --- Packets -------------------------------------------------------------------------------------


def target_of(packet: bytes) -> bytes:
    return packet[16:20] if packet[0] >> 4 == 4 else packet[24:40]


# --- The two ends --------------------------------------------------------------------------------


class Server:
    """The server's end: clients are known by their keys, and their addresses may change."""

    def __init__(self, clients: list[Client], cipher: str, dropped: Counter[str]) -> None:
        self._cipher = cipher
        self._by_id = {client.id: client for client in clients}
        self._by_address = {each: client for client in clients for each in client.addresses}
        self._sessions: dict[bytes, tuple[Client, Session]] = {}
        self._dropped = dropped

    async def send(self, packets: list[bytes], now: float) -> None:
        runs: list[tuple[Client | None, list[bytes]]] = []
        last: bytes | None = None
        for packet in packets:
            if (target := target_of(packet)) != last:
                last = target
                runs.append((self._by_address.get(target), []))
            runs[-1][1].append(packet)
        for client, run_ in runs:
            if client is None or client.current is None or client.where is None:
                self._dropped["to nobody" if client is None else "no session"] += len(run_)
            else:
                sock, address = client.where
                await send(sock, client.current.seal(run_, self._dropped), address)

    def receive(
        self, sock: DatagramSocket, messages: list[bytes], source: Address, now: float
    ) -> list[bytes]:
        head = messages[0][:8]
        if head[:1] == HELLO:
            self._welcome(sock, messages[0], source, now)
            return []
        client, session = self._sessions.get(head[1:], (None, None))
        if client is None or session is None or head[:1] != DATA:
            self._dropped["of no known session"] += len(messages)
            return []
        packets, newest = session.open(messages, self._dropped)
        if not packets:
            return []
        if session in client.offered:
            self._confirm(client, session)
        if newest and session is client.current:
            client.where = sock, source  # roaming
        if not all(packets) and client.current is not None:  # answer a keepalive with a keepalive
            send_now(sock, client.current.seal([b""], self._dropped), source, self._dropped)
        return [packet for packet in packets if self._belongs(packet, client)]

    def _belongs(self, packet: bytes, client: Client) -> bool:
        source = packet[12:16] if packet[:1] < b"\x60" else packet[8:24]
        if packet and source not in client.addresses:
            self._dropped["from an address that is not the client's"] += 1
            return False
        return bool(packet)

    def _welcome(self, sock: DatagramSocket, hello: bytes, source: Address, now: float) -> None:
        client = self._by_id.get(hello[1:9])
        if client is None or len(hello) != HELLO_BYTES or not genuine(client, hello):
            self._dropped["forged"] += 1
            return
        index = os.urandom(7)
        welcome = make_welcome(client, hello, index)
        secret = agree(client.key, hello, welcome, self._cipher)
        if len(client.offered) == client.offered.maxlen:
            del self._sessions[client.offered.popleft().index]
        session = Session(index, secret, self._cipher, True, now)
        client.offered.append(session)
        self._sessions[index] = client, session
        send_now(sock, [welcome], source, self._dropped)

    def _confirm(self, client: Client, session: Session) -> None:
        """Use a session from now on; keep the previous one for messages still on the way."""
        for old in [client.previous, *(each for each in client.offered if each is not session)]:
            if old is not None:
                del self._sessions[old.index]
        client.previous, client.current = client.current, session
        client.offered.clear()

    def tick(self, now: float) -> float:
        """Forget sessions that no client uses any more."""
        for client in self._by_id.values():
            for session in (client.current, client.previous, *client.offered):
                if session is not None and now - session.began > 2 * RENEW_SECONDS:
                    del self._sessions[session.index]
                    if session is client.current:
                        client.current = None
                    elif session is client.previous:
                        client.previous = None
                    else:
                        client.offered.remove(session)
        return RENEW_SECONDS / 10


class OneServer:
    """The client's end: sends HELLO until there is a session, and again to renew it."""

    def __init__(
        self,
        client: Client,
        cipher: str,
        sock: DatagramSocket,
        server: Address,
        keepalive: float,
        dropped: Counter[str],
    ) -> None:
        self._client, self._cipher, self._dropped = client, cipher, dropped
        self._sock, self._server, self._keepalive = sock, server, keepalive
        self._current: Session | None = None
        self._previous: Session | None = None
        self._hello: bytes | None = None
        self._hello_at = self._sent_at = self._heard_at = float("-inf")

    async def send(self, packets: list[bytes], now: float) -> None:
        if self._current is None:
            self._dropped["no session"] += len(packets)
            return
        self._sent_at = now
        await send(self._sock, self._current.seal(packets, self._dropped), self._server)

    def _keep_alive(self, now: float) -> None:
        if self._current is not None:
            self._sent_at = now
            empty = self._current.seal([b""], self._dropped)
            send_now(self._sock, empty, self._server, self._dropped)

    def receive(
        self, sock: DatagramSocket, messages: list[bytes], source: Address, now: float
    ) -> list[bytes]:
        head = messages[0][:8]
        if head[:1] == WELCOME:
            self._welcomed(messages[0], now)
            return []
        for session in (self._current, self._previous):
            if session is not None and head == DATA + session.index:
                packets, _ = session.open(messages, self._dropped)
                if packets and session is self._current:
                    self._heard_at = now
                return [packet for packet in packets if packet]
        self._dropped["of no known session"] += len(messages)
        return []

    def _welcomed(self, welcome: bytes, now: float) -> None:
        hello = self._hello
        if hello is None or len(welcome) != WELCOME_BYTES or welcome[1:9] != self._client.id:
            self._dropped["of no known session"] += 1
        elif not genuine(self._client, welcome, hello):
            self._dropped["forged"] += 1
        else:
            secret = agree(self._client.key, hello, welcome, self._cipher)
            self._previous = self._current
            self._current = Session(welcome[9:16], secret, self._cipher, False, now)
            self._hello, self._heard_at = None, now
            self._keep_alive(now)  # so that the server confirms it

    def tick(self, now: float) -> float:
        session = self._current
        if session is not None and now - self._heard_at > SILENT_KEEPALIVES * self._keepalive:
            self._hello = self._hello or make_hello(self._client)
        if session is None or now - session.began > RENEW_SECONDS:
            self._hello = self._hello or make_hello(self._client)
        if self._hello is not None and now - self._hello_at >= RETRY_SECONDS:
            self._hello_at = now
            send_now(self._sock, [self._hello], self._server, self._dropped)
        if session is not None and now - self._sent_at >= self._keepalive:
            self._keep_alive(now)
        return min(RETRY_SECONDS, self._keepalive) / 4


# --- The program ---------------------------------------------------------------------------------


End = Server | OneServer


class Tunnel:
    """Carries packets between a device and the server's or the client's end."""

    def __init__(self, tun: aiotun.TunDevice, end: End, dropped: Counter[str]) -> None:
        self._tun, self._end, self._dropped = tun, end, dropped

    async def from_device(self) -> None:
        async for packets in self._tun.batches(BATCH):
            await self._end.send(clamped(packets, self._tun.mtu), time.monotonic())

    async def from_socket(self, sock: DatagramSocket) -> None:
        async for datagrams, source in sock.batches(BATCH):
            packets: list[bytes] = []
            for run_ in runs_of_one_session(datagrams, self._dropped):
                packets += self._end.receive(sock, run_, source, time.monotonic())
            whole = [each for each in packets if len(each) >= (20 if each[0] < 0x60 else 40)]
            self._dropped["not an IP packet"] += len(packets) - len(whole)
            await deliver(self._tun, clamped(whole, self._tun.mtu), self._dropped)

    async def keep_time(self) -> None:
        while True:
            seconds = self._end.tick(time.monotonic())
            await asyncio.sleep(seconds)


def runs_of_one_session(datagrams: list[bytes], dropped: Counter[str]) -> list[list[bytes]]:
    runs: list[list[bytes]] = []
    last = b""
    for datagram in datagrams:
        if len(datagram) < HEAD_BYTES + TAG_BYTES:
            dropped["truncated"] += 1
        elif (head := datagram[:8]) == last and head[:1] == DATA:
            runs[-1].append(datagram)
        else:
            last = head
            runs.append([datagram])
    return runs


async def serve(args: argparse.Namespace) -> None:
    clients = read_keys(args.key)
    dropped: Counter[str] = Counter()
    async with contextlib.AsyncExitStack() as stack:

        async def listen(address: Address) -> DatagramSocket:
            opener = aiotun.open_datagrams(address, receive_bytes=RECEIVE_BYTES)
            return await stack.enter_async_context(opener)

        end: End
        if args.command == "server":
            socks = [await listen(resolve(each)) for each in args.bind]
            end = Server(clients, args.cipher, dropped)
        else:
            server = resolve(args.connect)
            socks = [await listen(("::" if ":" in server[0] else "0.0.0.0", 0))]
            end = OneServer(clients[0], args.cipher, socks[0], server, args.keepalive, dropped)
        opener = aiotun.open_tun(
            args.name, addresses=args.address, mtu=args.mtu, txqueuelen=QUEUE, offload="split"
        )
        tun = await stack.enter_async_context(opener)

        def show(lost: Counter[str]) -> str:
            text = ", ".join(f"{count} {why}" for why, count in (lost + dropped).items())
            return f"dropped: {text or 'nothing'}"

        tunnel = Tunnel(tun, end, dropped)
        await until_signal(
            tun.name,
            tunnel.from_device(),
            *(tunnel.from_socket(sock) for sock in socks),
            tunnel.keep_time(),
            report(tun, socks, show),
        )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    key = commands.add_parser("key", help="print a line for the key file, with a new key")
    key.add_argument("client")
    key.add_argument("addresses", nargs="+", type=ip_address, metavar="ADDRESS")
    for command in ("server", "client"):
        each = commands.add_parser(command)
        each.add_argument("--key", type=Path, required=True, metavar="FILE")
        each.add_argument("--address", action="append", type=with_prefix, required=True)
        each.add_argument("--name", help="the interface's name")
        each.add_argument("--mtu", type=int, default=1400, help="of the tunnel (default: 1400)")
        each.add_argument("--cipher", choices=list(CIPHERS), default="aes-256-gcm")
        each.add_argument("--uvloop", action="store_true")
        if command == "server":
            each.add_argument("--bind", action="append", required=True, metavar="HOST:PORT")
        else:
            each.add_argument("--connect", required=True, metavar="HOST:PORT")
            each.add_argument("--keepalive", type=float, default=5.0, metavar="SECONDS")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.command == "key":
        text = base64.b64encode(os.urandom(32)).decode()
        print(args.client, *args.addresses, text)
        return 0
    return run(serve(args), args.uvloop)


if __name__ == "__main__":
    sys.exit(main())
