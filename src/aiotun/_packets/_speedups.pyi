from collections.abc import Iterable

from typing_extensions import Buffer

READ_SIZE: int

def read(fd: int, size: int, /) -> bytes: ...
def read_many(fd: int, size: int, limit: int, /) -> list[bytes]: ...
def write_many(fd: int, packets: list[Buffer], /) -> int: ...
def send_run(fd: int, datagrams: list[Buffer], address: bytes | None, largest: int, /) -> int: ...
def read_split(
    fd: int, frame: bool, limit: int, header: int = 10, /
) -> tuple[list[bytes], int]: ...
def split(super_packet: Buffer, frame: bool = False, /) -> list[bytes]: ...
def merge(
    packets: Iterable[Buffer],
    frame: bool = False,
    udp: bool = True,
    places: list[int] | None = None,
    /,
) -> list[bytes]: ...
def write_merged(
    fd: int, packets: Iterable[Buffer], frame: bool, header: int = 10, udp: bool = True, /
) -> list[int]: ...
def find_other(packets: list[Buffer], start: int, header: int, tcp: bool, /) -> int: ...
def read_run(
    fd: int,
    first: bytes | None,
    buffer: memoryview,
    layout: tuple[int, int, int, int, int],
    frame: bool,
    header: int,
    /,
) -> tuple[int, int, int, int, bytes | None, bool]: ...
def write_run(
    fd: int,
    buffer: Buffer,
    start: int,
    stride: int,
    lengths: list[int],
    frame: bool,
    header: int,
    udp: bool = True,
    /,
) -> list[int]: ...
def checksum(data: Buffer, initial: int = 0, /) -> int: ...
