"""Who has which address, and until when: kept in SQLite, asked in memory. No network I/O.

Times are seconds since the epoch, and given by the caller. A change is in the file once `commit`
has returned; whoever answers a client does that first. A kill at any moment leaves what the last
commit left (SQLite's journal), and the file itself refuses to have an address, or a client, twice.
"""

import dataclasses
import heapq
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Self

__all__ = ["Lease", "Leases"]

_SCHEMA = """
create table if not exists leases (
    address integer primary key,
    client blob unique,  -- null: nobody's, and not to be given to anybody (declined)
    expires real not null
) without rowid
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Lease:
    """An address that belongs, or belonged, to a client; or that nobody may have for a while."""

    address: IPv4Address
    client: bytes | None  # None: somebody uses it whom we did not give it to
    expires: float


class Leases:
    """The table. At most one lease an address and one a client, also those that have expired."""

    def __init__(
        self, first: IPv4Address, last: IPv4Address, file: str | Path = ":memory:"
    ) -> None:
        """Open the file, and make it where it does not exist.

        Raises:
            sqlite3.Error: it is no such file, or another server has it open.
        """
        self._first, self._last = int(first), int(last)
        # Where `unused` looks: from `_next` on nobody had an address; `_free` has those that were
        # given back; `_ending`, a heap, says when a lease ends. An address that was taken since
        # stays in there until `unused` meets it, and its entry is deleted then.
        self._next = self._first
        self._free: OrderedDict[IPv4Address, None] = OrderedDict()
        self._ending: list[tuple[float, IPv4Address]] = []
        self._changed = False
        self._by_client: dict[bytes, Lease] = {}
        self._by_address: dict[IPv4Address, Lease] = {}
        self._db = sqlite3.connect(file, timeout=1, isolation_level=None)
        try:
            # For as long as it is open: two servers on one file would give an address twice.
            self._db.execute("pragma locking_mode = exclusive")
            # Now and then the log is put into the file, which waits for the disk, and with it all
            # clients: some 20 ms. With short pages, of which each commit writes one, and a long log
            # (4 MB) that is every 8,000 answers, not every 1,000.
            self._db.execute("pragma page_size = 512")
            self._db.execute("pragma wal_autocheckpoint = 8000")
            self._db.execute("pragma journal_mode = wal")
            # A commit reaches the kernel, which a kill of ours can't change; the disk hears of it
            # later. A power cut may forget the newest leases, but not tear the file, and before
            # such an address is offered to another client a probe finds the one that has it.
            # "full" waits for the disk each time: the median answer took 9 ms, not 0.3.
            self._db.execute("pragma synchronous = normal")
            self._db.execute("begin exclusive")
            self._db.execute(_SCHEMA)
            self._db.execute("commit")
            self._load()
        except BaseException:
            self._db.close()
            raise

    def _load(self) -> None:
        # Those out of the range, which may have been another before, stay in the file and are
        # given to nobody.
        rows = self._db.execute("select address, client, expires from leases")
        for address, client, expires in rows.fetchall():
            if self._first <= address <= self._last:
                self._remember(Lease(IPv4Address(address), client, expires))

    def close(self) -> None:
        self.commit()
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, address: IPv4Address) -> bool:
        """Whether an address is in the range, whoever has it."""
        return self._first <= int(address) <= self._last

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._by_address.values()))

    def of(self, client: bytes) -> Lease | None:
        """What a client has, or had last."""
        return self._by_client.get(client)

    def at(self, address: IPv4Address) -> Lease | None:
        """Who has an address, or had it last."""
        return self._by_address.get(address)

    def free(self, address: IPv4Address, client: bytes, now: float) -> bool:
        """Whether a client may have an address: nobody else has it."""
        lease = self._by_address.get(address)
        return address in self and (lease is None or lease.client == client or lease.expires <= now)

    def unused(self, now: float, taken: Callable[[IPv4Address], bool]) -> IPv4Address | None:
        """Find an address for a new client, in the same time however many there are.

        One that nobody had yet comes first, then one that was given back, then the one whose lease
        ended first.

        Args:
            taken: whether an address can't be offered now; who takes it later gives it back.
        """
        while self._next <= self._last:
            address = IPv4Address(self._next)
            if address not in self._by_address and not taken(address):
                return address
            self._next += 1
        while True:
            while self._free:
                address = next(iter(self._free))
                lease = self._by_address.get(address)
                if (lease is None or lease.expires <= now) and not taken(address):
                    return address
                del self._free[address]
            if not self._ending or self._ending[0][0] > now:
                return None
            expires, address = heapq.heappop(self._ending)
            lease = self._by_address.get(address)
            if lease is not None and lease.expires == expires:  # neither renewed nor given up
                self._free[address] = None

    def give_back(self, address: IPv4Address) -> None:
        """Say that an address is no longer taken; whether it has a lease does not matter."""
        if address in self:
            self._free[address] = None

    def grant(self, address: IPv4Address, client: bytes, now: float, seconds: float) -> Lease:
        """Give an address to a client, which gives up what it had.

        Raises:
            ValueError: it is not free.
        """
        if not self.free(address, client, now):
            raise ValueError(f"{address} is not free")
        before = self._by_client.get(client)
        if before is not None and before.address != address:
            self._forget(before)
        lease = Lease(address, client, now + seconds)
        self._write(lease)
        return lease

    def release(self, lease: Lease, now: float) -> None:
        """A client gives its address back; it gets the same again where it can."""
        self._write(dataclasses.replace(lease, expires=now))

    def block(self, address: IPv4Address, now: float, seconds: float) -> None:
        """Somebody uses an address who did not get it here: give it to nobody for some time."""
        self._write(Lease(address, None, now + seconds))

    def commit(self) -> None:
        """Have all changes in the file."""
        if self._changed:
            self._db.execute("commit")
            self._changed = False

    # What follows changes memory and file alike.

    def _remember(self, lease: Lease) -> None:
        before = self._by_address.get(lease.address)
        if before is not None and before.client is not None:
            del self._by_client[before.client]
        self._by_address[lease.address] = lease
        if lease.client is not None:
            self._by_client[lease.client] = lease
        heapq.heappush(self._ending, (lease.expires, lease.address))
        # A renewal leaves the entry of the time before. Rebuilding the heap is rare enough.
        if len(self._ending) > 2 * len(self._by_address) + 64:
            self._ending = [(each.expires, each.address) for each in self._by_address.values()]
            heapq.heapify(self._ending)

    def _write(self, lease: Lease) -> None:
        self._begin()
        # One that is out of the range by now would else be the client's second.
        self._db.execute(
            "delete from leases where client = ? and address != ?",
            (lease.client, int(lease.address)),
        )
        self._db.execute(
            "insert into leases values (?, ?, ?) on conflict (address) "
            "do update set client = excluded.client, expires = excluded.expires",
            (int(lease.address), lease.client, lease.expires),
        )
        self._remember(lease)

    def _forget(self, lease: Lease) -> None:
        self._begin()
        self._db.execute("delete from leases where address = ?", (int(lease.address),))
        del self._by_address[lease.address]
        if lease.client is not None:
            del self._by_client[lease.client]
        self.give_back(lease.address)

    def _begin(self) -> None:
        if not self._changed:
            self._db.execute("begin")
            self._changed = True
