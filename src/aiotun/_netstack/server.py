"""The server that `intercept_tcp`, `intercept_udp` and `intercept_ping` return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Interceptor", "Server"]


class Interceptor(Protocol):
    """The implementation of a server, for TCP, UDP or pings."""

    @property
    def closed(self) -> bool: ...

    def close(self) -> None:
        """Stop intercepting. Idempotent."""

    async def wait_closed(self) -> None:
        """Wait until the program's functions that `close` cancelled have ended."""


class Server:
    """Intercepts for as long as it is open; see the methods ``intercept_...`` of `Netstack`.

    ``async with server:`` closes it at the end of the block.
    """

    def __init__(self, interceptor: Interceptor) -> None:
        # Internal.
        self._interceptor = interceptor

    @property
    def closed(self) -> bool:
        """Whether the server was closed, by `close` or with its stack."""
        return self._interceptor.closed

    def is_of(self, kind: type) -> bool:
        """Internal: whether its interceptor is of this class."""
        return isinstance(self._interceptor, kind)

    def close(self) -> None:
        """Stop intercepting at once; may be called again.

        TCP connections that were accepted go on. UDP flows end.
        """
        self._interceptor.close()

    async def wait_closed(self) -> None:
        """Wait until no call of `admit` or `on_ping` is under way; call `close` before.

        This does not wait for accepted connections and flows. Raises nothing.

        *Cancellation*: the task only stops waiting.

        *Concurrency*: may be called any number of times at once.
        """
        await self._interceptor.wait_closed()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        await self.wait_closed()
