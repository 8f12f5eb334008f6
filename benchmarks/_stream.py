"""One end of a TCP stream: takes connections, throws away what comes, and says how much that was.

A program for another namespace, and `stream`, which is the other end. For a fraction of a second,
where starting an iperf3 would take longer than it runs.
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
                # MSG_TRUNC: TCP throws the bytes away instead of copying them.
                while got := connection.recv_into(buffer, 0, socket.MSG_TRUNC):
                    count += got
                connection.sendall(b"%d" % count)


def stream(address: str, seconds: float) -> tuple[int, float]:
    """Send for so long: bytes that came through, and seconds until the last of them had."""
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
        raise OSError(f"{received} of {sent} bytes came through to {address}")
    return received, elapsed


if __name__ == "__main__":
    sink()
