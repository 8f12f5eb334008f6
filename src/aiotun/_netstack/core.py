"""What the parts of one stack share."""

from __future__ import annotations

import dataclasses
import resource
from typing import TYPE_CHECKING

from .._queue.recordingport import RecordingPort
from .counts import Counts
from .intake import Intake
from .intakeport import IntakePort

if TYPE_CHECKING:
    from ..device import TunDevice
    from ..namespaces import Namespace
    from .mechanism import Mechanism

__all__ = ["Core", "spare_descriptors"]

# Descriptors that the rest of the program keeps.
_RESERVED = 64


@dataclasses.dataclass(eq=False)
class Core:
    """The state of a stack; `Netstack` is its public interface.

    Attributes:
        namespace: where its sockets are made.
        tun: the device.
        own: the stack's own addresses, packed. Packets to them are not intercepted.
        mechanism: how connections to other addresses are accepted; None if the stack does not
            intercept.
        counts: for `Netstack.stats`.
        intake: takes the packets that are not for the kernel.
        closing: whether the stack is being closed, or was.
    """

    namespace: Namespace
    tun: TunDevice
    own: frozenset[bytes]
    mechanism: Mechanism | None
    counts: Counts
    intake: Intake
    closing: bool = False

    def write(self, packet: bytes) -> None:
        """Give the kernel a packet that the intake kept.

        Raises:
            OSError: the kernel refuses the packet, or the device was closed.
        """
        queue = self.tun.queues[0]
        port = queue.port
        while isinstance(port, RecordingPort | IntakePort):  # they have seen the packet already
            port = port.inner
        port.write(queue.fileno(), packet)


def spare_descriptors() -> int:
    """Return how many descriptors connections and flows may use, by RLIMIT_NOFILE.

    A connection that is passed on takes two.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 20
    return max(limit - _RESERVED, limit // 2)
