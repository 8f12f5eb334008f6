"""What each program of this folder does, so that all do the same work.

It opens a TUN device (lwIP: a TAP device) with the name that it is given, prints ``ready NAME``,
and runs until its stdin ends. The benchmark gives the kernel's side of the device an address. The
program answers for the other addresses of that network, with an MTU of 1,500:

- 7001: reads until the client's end, answers with the number of bytes (8 bytes, big-endian), and
  closes.
- 7002: writes until the client closes.
- 7003: reads one byte, writes it back, waits for the client's end, and closes.
- 7004, UDP: sends each datagram back.
"""

SINK, SOURCE, SHORT, ECHO = 7001, 7002, 7003, 7004
BLOCK = 256 * 1024  # how much is read and written at once
