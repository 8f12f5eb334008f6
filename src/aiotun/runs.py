"""Runs: many packets in one buffer, for programs that seal or copy each packet anyway.

`Queue.recv_run` splits a super-packet straight into a buffer, with room before and after each
segment. `Queue.send_run` merges and sends packets from a buffer. No packet becomes an object.
"""

from ._packets.runs import Pool, Run

__all__ = ["Pool", "Run"]
