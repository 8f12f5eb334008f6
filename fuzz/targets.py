"""All targets by name."""

from . import frames, packets, superpackets, tunnels, words
from ._target import Target

__all__ = ["TARGETS"]

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (packets, superpackets, frames, tunnels, words)
    for target in module.TARGETS
}
