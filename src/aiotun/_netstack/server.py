"""What `intercept_tcp` and `intercept_udp` return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Interceptor", "Server"]


class Interceptor(Protocol):
    """What is behind a server."""

    @property
    def closed(self) -> bool: ...

    def close(self) -> None:
        """Intercept nothing more, at once. Idempotent."""

    async def wait_closed(self) -> None:
        """Wait until what `close` began has ended."""


class Server:
    """Intercepts for as long as it is open; see `Netstack.intercept_tcp` and `intercept_udp`.

    ``async with server:`` closes it at the end of the block.
    """

    def __init__(self, interceptor: Interceptor) -> None:
        # Internal.
        self._interceptor = interceptor

    @property
    def closed(self) -> bool:
        """Whether it was closed, here or with its stack."""
        return self._interceptor.closed

    def is_of(self, kind: type) -> bool:
        """Internal: whether it intercepts what this class does."""
        return isinstance(self._interceptor, kind)

    def close(self) -> None:
        """Accept nothing more, at once; may be called again.

        TCP connections that were accepted go on. UDP flows end.
        """
        self._interceptor.close()

    async def wait_closed(self) -> None:
        """After `close`: wait until no question to `admit` is open.

        It does not wait for what was accepted. Raises nothing.

        *Cancellation*: only the waiting ends.

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
