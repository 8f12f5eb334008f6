"""The leases: which client has which address, and until when. No network I/O.

They are stored in SQLite and looked up in memory. Times are seconds since the epoch, passed by the
caller. A change is in the file when `commit` has returned; the server commits before it answers a
client. If the process is killed, the file has the state of the last commit (SQLite's journal), and
its schema does not allow an address or a client twice.
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
    """An address that a client has or had, or that is blocked for a while."""

    address: IPv4Address
    client: bytes | None  # None: blocked, because a host uses it without a lease
    expires: float


class Leases:
    """The table of leases. One per address and one per client, including expired leases."""

    def __init__(
        self, first: IPv4Address, last: IPv4Address, file: str | Path = ":memory:"
    ) -> None:
        """Open the file; create it if it does not exist.

        Raises:
            sqlite3.Error: it is not such a file, or another server has it open.
        """
        self._first, self._last = int(first), int(last)
        # `unused` looks here: no client ever had an address from `_next` on; `_free` has the
        # addresses that were given back; the heap `_ending` has the times at which leases end. An
        # entry whose address has been taken since stays until `unused` meets it and deletes it.
        self._next = self._first
        self._free: OrderedDict[IPv4Address, None] = OrderedDict()
        self._ending: list[tuple[float, IPv4Address]] = []
        self._changed = False
        self._by_client: dict[bytes, Lease] = {}
        self._by_address: dict[IPv4Address, Lease] = {}
        self._db = sqlite3.connect(file, timeout=1, isolation_level=None)
        try:
            # Locked while it is open: two servers on one file would lease an address twice.
            self._db.execute("pragma locking_mode = exclusive")
            # From time to time SQLite copies the log into the file and waits for the disk. This
            # takes about 20 ms, in which no client is answered. With small pages (each commit
            # writes one) and a long log of 4 MB it happens every 8,000 answers instead of every
            # 1,000.
            self._db.execute("pragma page_size = 512")
            self._db.execute("pragma wal_autocheckpoint = 8000")
            self._db.execute("pragma journal_mode = wal")
            # A commit reaches the kernel, so it survives if this process is killed; it reaches the
            # disk later. A power cut may lose the newest leases, but it can't corrupt the file.
            # Before such an address is offered to another client, a probe finds the client that has
            # it. "full" waits for the disk at each commit: the median answer took 9 ms instead of
            # 0.3.
            self._db.execute("pragma synchronous = normal")
            self._db.execute("begin exclusive")
            self._db.execute(_SCHEMA)
            self._db.execute("commit")
            self._load()
        except BaseException:
            self._db.close()
            raise

    def _load(self) -> None:
        # The range may have been different before. Leases outside of it stay in the file, and
        # their addresses are not leased.
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
        """Whether an address is in the range, leased or not."""
        return self._first <= int(address) <= self._last

    def __iter__(self) -> Iterator[Lease]:
        return iter(list(self._by_address.values()))

    def of(self, client: bytes) -> Lease | None:
        """The lease that a client has, or had last."""
        return self._by_client.get(client)

    def at(self, address: IPv4Address) -> Lease | None:
        """The lease of an address, or its last lease."""
        return self._by_address.get(address)

    def free(self, address: IPv4Address, client: bytes, now: float) -> bool:
        """Whether a client may have an address: no other client has it."""
        lease = self._by_address.get(address)
        return address in self and (lease is None or lease.client == client or lease.expires <= now)

    def unused(self, now: float, taken: Callable[[IPv4Address], bool]) -> IPv4Address | None:
        """Find an address for a new client, in constant time.

        Prefers an address that was never leased, then one that was given back, then the one whose
        lease ended first.

        Args:
            taken: returns whether an address can't be offered now. The caller must call `give_back`
                when that ends.
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
            if lease is not None and lease.expires == expires:  # neither renewed nor released
                self._free[address] = None

    def give_back(self, address: IPv4Address) -> None:
        """Report that an address is no longer taken; it may have a lease or not."""
        if address in self:
            self._free[address] = None

    def grant(self, address: IPv4Address, client: bytes, now: float, seconds: float) -> Lease:
        """Lease an address to a client; its previous lease ends.

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
        """End a lease; the client gets the same address again if it is still free."""
        self._write(dataclasses.replace(lease, expires=now))

    def block(self, address: IPv4Address, now: float, seconds: float) -> None:
        """Lease an address to no client for some time, because a host uses it without a lease."""
        self._write(Lease(address, None, now + seconds))

    def commit(self) -> None:
        """Write all changes to the file."""
        if self._changed:
            self._db.execute("commit")
            self._changed = False

    # These methods change memory and file together.

    def _remember(self, lease: Lease) -> None:
        before = self._by_address.get(lease.address)
        if before is not None and before.client is not None:
            del self._by_client[before.client]
        self._by_address[lease.address] = lease
        if lease.client is not None:
            self._by_client[lease.client] = lease
        heapq.heappush(self._ending, (lease.expires, lease.address))
        # A renewal leaves its old entry in the heap. Rebuild the heap when half of it is old.
        if len(self._ending) > 2 * len(self._by_address) + 64:
            self._ending = [(each.expires, each.address) for each in self._by_address.values()]
            heapq.heapify(self._ending)

    def _write(self, lease: Lease) -> None:
        self._begin()
        # Otherwise a lease that is now outside of the range would be the client's second.
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
