"""A short TCP stream, for which starting iperf3 would take longer than the stream.

As a program, for another namespace, this is the receiver: it accepts connections, drops the data,
and answers with the number of bytes. `stream` is the sender.
"""

import socket
import time

PORT = 5201


def sink() -> None:
    with socket.create_server(("", PORT)) as server:
        print("ready sink", flush=True)
        while True:
            connection, _ = server.accept()
            with connection:
                count = 0
                buffer = bytearray(1 << 20)
                # With MSG_TRUNC, TCP drops the bytes instead of copying them.
                while got := connection.recv_into(buffer, 0, socket.MSG_TRUNC):
                    count += got
                connection.sendall(b"%d" % count)


def stream(address: str, seconds: float) -> tuple[int, float]:
    """Send for that many seconds; return the bytes received, and seconds until the last arrived."""
    data = bytes(1 << 18)
    sent = 0
    with socket.create_connection((address, PORT), timeout=20) as connection:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            connection.sendall(data)
            sent += len(data)
        connection.shutdown(socket.SHUT_WR)
        received = int(connection.recv(64))
        elapsed = time.perf_counter() - start
    if received != sent:
        raise OSError(f"{address} received {received} of {sent} bytes")
    return received, elapsed


if __name__ == "__main__":
    sink()
