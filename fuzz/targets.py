"""All targets by name."""

from . import frames, packets, segmenting, superpackets, tunnels, words
from ._target import Target

__all__ = ["TARGETS"]

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (packets, superpackets, segmenting, frames, tunnels, words)
    for target in module.TARGETS
}
