"""How a DHCP server answers each message (RFC 2131, section 4.3). No I/O, no clock."""

import dataclasses
from collections import Counter, OrderedDict
from ipaddress import IPv4Address, IPv4Interface

from _dhcp_leases import Leases
from _dhcp_message import NOBODY, Message, Opt, Type, addresses, seconds

__all__ = ["OFFER_TIME", "Config", "Probe", "Rules"]

OFFER_TIME = 60.0  # how long an offered address is reserved for the client
BLOCK_TIME = 3600.0  # how long an address is not leased after a host used it without a lease


@dataclasses.dataclass(frozen=True)
class Config:
    """What the server tells its clients about the network."""

    address: IPv4Interface
    lease: float = 3600.0
    router: IPv4Address = NOBODY
    dns: tuple[IPv4Address, ...] = ()
    boot_file: bytes = b""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Asks to check that no host uses an address before it is offered (RFC 2131, section 2.2)."""

    address: IPv4Address
    request: Message


class Rules:
    """Answers messages. `counters` counts every message and its outcome.

    `handle` returns the answer, None, or a `Probe`. For a probe, find out who has the address and
    call `probed`, which returns one of the three again. Send an answer only after the leases have
    been committed.
    """

    def __init__(self, config: Config, leases: Leases) -> None:
        self.counters: Counter[str] = Counter()
        self._config = config
        self._leases = leases
        # By client, the oldest first. An OrderedDict, because an ordinary dict takes longer and
        # longer to find its first item after many deletions before it.
        self._offers: OrderedDict[bytes, tuple[IPv4Address, float]] = OrderedDict()
        self._offered: dict[IPv4Address, bytes] = {}  # the same by address
        self._probing: dict[bytes, Probe] = {}  # by client: the message to answer
        self._probed: set[IPv4Address] = set()  # the same addresses
        self._common = self._common_options()

    def handle(self, request: Message, now: float, direct: bool = False) -> Message | Probe | None:
        """Answer a message; `direct`: it was sent to our own address, so no other server got it."""
        if request.type is None:
            return self._drop("bootp")
        self._count(request.type.name.lower())
        if request.unknown:
            self._count("unknown_options")
        if request.malformed:
            self.counters["malformed_options"] += request.malformed
        if request.giaddr != NOBODY:
            self._count("relayed")
            if request.giaddr not in self._config.address.network:
                return self._drop("relayed_from_elsewhere")  # we have no addresses for that network
        match request.type:
            case Type.DISCOVER:
                return self._discover(request, now)
            case Type.REQUEST:
                return self._request(request, now, direct)
            case Type.RELEASE | Type.DECLINE if self._for_another(request):
                return self._drop("for_another_server")
            case Type.RELEASE:
                return self._release(request, now)
            case Type.DECLINE:
                return self._decline(request, now)
            case Type.INFORM:
                return self._inform(request)
            case _:
                return self._drop("not_from_a_client")

    def probed(self, probe: Probe, user: bytes | None, now: float) -> Message | Probe | None:
        """Continue after a probe; `user` is the MAC that answered for the address, or None."""
        client = probe.request.client
        self._probing.pop(client, None)
        self._probed.discard(probe.address)
        self._leases.give_back(probe.address)
        offered = self._offers.get(client)
        if offered is None or offered[0] != probe.address:
            return None  # the client has another address meanwhile
        # The client itself may still have the address.
        if user is None or user == probe.request.chaddr:
            return self._offer(probe.request, probe.address, now)
        self._count("in_use")
        self._withdraw(client)
        self._leases.block(probe.address, now, BLOCK_TIME)
        return self._discover(probe.request, now)

    # Section 4.3.1

    def _discover(self, request: Message, now: float) -> Message | Probe | None:
        client = request.client
        self._expire_offers(now)
        running = self._probing.get(client)
        if running is not None:  # it asked again; answer once, with its newest xid
            running.request.xid, running.request.secs = request.xid, request.secs
            return self._drop("repeated")
        offered = self._offers.get(client)
        if offered is not None:
            return self._offer(request, offered[0], now)
        lease = self._leases.of(client)
        address = self._choose(request, now)
        if address is None:
            return self._drop("exhausted")
        self._keep(address, client, now)
        if lease is not None and lease.address == address and lease.expires > now:
            return self._offer(request, address, now)  # the client has it, even if a host answers
        probe = self._probing[client] = Probe(address, request)
        self._probed.add(address)
        return probe

    def _choose(self, request: Message, now: float) -> IPv4Address | None:
        """Choose the client's own address if it is free, else the one it wants, else any."""
        lease = self._leases.of(request.client)
        wishes = [lease.address] if lease is not None else []
        wishes.append(request.address(Opt.REQUESTED_ADDRESS))
        for wish in wishes:
            if not self._taken(wish) and self._leases.free(wish, request.client, now):
                return wish
        return self._leases.unused(now, self._taken)

    def _taken(self, address: IPv4Address) -> bool:
        # A probe may still run after its offer was withdrawn.
        ours = self._config.address.ip
        return address in self._offered or address in self._probed or address == ours

    def _usable(self, address: IPv4Address, client: bytes, now: float) -> bool:
        return address != self._config.address.ip and self._leases.free(address, client, now)

    def _offer(self, request: Message, address: IPv4Address, now: float) -> Message:
        self._keep(address, request.client, now)
        return self._answer(request, Type.OFFER, address)

    def _keep(self, address: IPv4Address, client: bytes, now: float) -> None:
        self._offers[client] = address, now + OFFER_TIME
        self._offers.move_to_end(client)
        self._offered[address] = client

    def _withdraw(self, client: bytes) -> None:
        """Forget the offer to a client, if there is one."""
        address, _ = self._offers.pop(client, (None, 0.0))
        if address is not None:
            del self._offered[address]
            self._leases.give_back(address)

    def _expire_offers(self, now: float) -> None:
        while self._offers:
            client, (_, end) = next(iter(self._offers.items()))
            if end > now:
                break
            self._withdraw(client)

    # Section 4.3.2

    def _request(self, request: Message, now: float, direct: bool) -> Message | None:
        client = request.client
        if self._for_another(request):
            self._withdraw(client)
            return self._drop("chose_another_server")
        renewing = request.ciaddr != NOBODY
        wanted = request.ciaddr if renewing else request.address(Opt.REQUESTED_ADDRESS)
        lease = self._leases.of(client)
        offered = self._offers.get(client)
        ours = lease.address if lease is not None else None
        if Opt.SERVER in request.options:  # SELECTING; we may have forgotten our offer
            ours = offered[0] if offered is not None else ours or wanted
        elif ours is None and offered is not None and offered[0] == wanted:
            ours = wanted  # SELECTING, but the client's option 54 was malformed
        if ours is not None:  # or INIT-REBOOT, RENEWING, REBINDING
            return self._grant(request, wanted, now) if wanted == ours else self._nak(request)
        # We don't know this client. Another server may know it and answer. But refuse an address of
        # another network, and refuse a client that asks only us, because no other server answers
        # it.
        if direct or wanted not in self._config.address.network or self._leases.at(wanted):
            return self._nak(request)
        return self._drop("unknown_clients")

    def _for_another(self, request: Message) -> bool:
        ours = self._config.address.ip
        return Opt.SERVER in request.options and request.address(Opt.SERVER) != ours

    def _grant(self, request: Message, address: IPv4Address, now: float) -> Message:
        client = request.client
        others = self._offered.get(address, client) != client
        if others or not self._usable(address, client, now):
            return self._nak(request)
        self._withdraw(client)
        self._leases.grant(address, client, now, self._config.lease)
        return self._answer(request, Type.ACK, address)

    def _nak(self, request: Message) -> Message:
        self._withdraw(request.client)
        self._count("nak_sent")
        return Message(
            type=Type.NAK,
            xid=request.xid,
            chaddr=request.chaddr,
            # The relay must broadcast it as well (section 4.3.2).
            broadcast=request.broadcast or request.giaddr != NOBODY,
            giaddr=request.giaddr,
            options={Opt.SERVER: addresses(self._config.address.ip), **_echoed(request)},
        )

    # Sections 4.3.3, 4.3.4 and 4.3.5

    def _decline(self, request: Message, now: float) -> Message | None:
        address = request.address(Opt.REQUESTED_ADDRESS)
        lease = self._leases.of(request.client)
        if lease is None or lease.address != address:
            return self._drop("not_theirs")
        self._withdraw(request.client)
        self._leases.block(address, now, BLOCK_TIME)
        return self._drop("blocked")

    def _release(self, request: Message, now: float) -> Message | None:
        lease = self._leases.of(request.client)
        if lease is None or lease.address != request.ciaddr or lease.expires <= now:
            return self._drop("not_theirs")
        self._leases.release(lease, now)
        return None

    def _inform(self, request: Message) -> Message | None:
        if request.ciaddr == NOBODY:
            return self._drop("no_address")
        return self._answer(request, Type.ACK, None)

    # Building answers (table 3)

    def _answer(self, request: Message, kind: Type, address: IPv4Address | None) -> Message:
        self._count(f"{kind.name.lower()}_sent")
        options = dict(self._common)
        if address is not None:
            lease = self._config.lease
            options[Opt.LEASE_TIME] = seconds(lease)
            options[Opt.T1] = seconds(lease / 2)  # section 4.4.5
            options[Opt.T2] = seconds(lease * 7 / 8)
        options.update(_echoed(request))
        return Message(
            type=kind,
            xid=request.xid,
            chaddr=request.chaddr,
            broadcast=request.broadcast,
            ciaddr=request.ciaddr if kind is Type.ACK else NOBODY,
            yiaddr=address or NOBODY,
            giaddr=request.giaddr,
            siaddr=self._config.address.ip if self._config.boot_file else NOBODY,
            file=self._config.boot_file,
            options=options,
        )

    def _common_options(self) -> dict[int, bytes]:
        config = self._config
        network = config.address.network
        options: dict[int, bytes] = {
            Opt.SERVER: addresses(config.address.ip),
            Opt.MASK: addresses(network.netmask),
            Opt.BROADCAST: addresses(network.broadcast_address),
        }
        if config.router != NOBODY:
            options[Opt.ROUTER] = addresses(config.router)
        if config.dns:
            options[Opt.DNS] = addresses(*config.dns)
        return options

    def _count(self, what: str) -> None:
        self.counters[what] += 1

    def _drop(self, what: str) -> Message | None:
        """Count a message that is not answered."""
        self.counters[what] += 1
        return None


def _echoed(request: Message) -> dict[int, bytes]:
    """The options that an answer repeats: RFC 6842, and RFC 3046 (which must be the last)."""
    return {
        code: request.options[code] for code in (Opt.CLIENT, Opt.RELAY) if code in request.options
    }
