"""Real programs inside `aiotun run`: ssh, QUIC, interactive shells, and the services for names."""

import asyncio
import contextlib
import datetime
import hashlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiotun

from ..commandline import COMMAND, Running, in_terminal
from ..helpers import need, ordinary_python
from .internet import (
    NET4,
    NET6,
    NameServer,
    internet_fixture,  # noqa: F401 - tests have it as `internet`
    outcome,
    python,
    run,
    with_resolv_conf,
)
from .kernel import without_mount

# --- ssh -----------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def ssh_server(there: aiotun.Namespace, host: str) -> AsyncIterator[None]:
    """Let everybody in, and send back what comes."""
    asyncssh = pytest.importorskip("asyncssh", reason="missing: asyncssh")

    class Server(asyncssh.SSHServer):  # type: ignore[name-defined,misc]  # it may be missing
        def begin_auth(self, username: str) -> bool:
            return False

    async def serve(process: Any) -> None:
        digest = hashlib.sha256()
        while data := await process.stdin.read(65536):
            digest.update(data)
            process.stdout.write(data)
            await process.stdout.drain()
        process.stderr.write(f"{process.command} {digest.hexdigest()}\n".encode())
        process.exit(3)

    sock = await there.socket()
    sock.bind((host, 22))
    server = await asyncssh.listen(
        sock=sock,
        server_factory=Server,
        server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
        process_factory=serve,
        encoding=None,
    )
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize("user", ["root", "ordinary"])
async def test_ssh(user: str, internet: aiotun.Namespace) -> None:
    command, options = COMMAND, dict[str, Any]()
    if user == "ordinary":
        python_command, env = ordinary_python()
        command, options = [*python_command, "-m", "aiotun"], {"env": env}
    words = "-o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no"
    script = f"seq 400000 | {need('ssh')} {words} joe@{NET4} greet | sha256sum"
    async with ssh_server(internet, NET4):
        ended = await run("--", "sh", "-c", script, command=command, **options)
    digest = hashlib.sha256(b"".join(b"%d\n" % each for each in range(1, 400001))).hexdigest()
    assert ended.out.split()[0] == digest, ended.err
    assert f"greet {digest}" in ended.err


# --- QUIC ----------------------------------------------------------------------------------------

QUIC = """
import asyncio, os, ssl, sys
from aioquic.asyncio import connect
from aioquic.quic.configuration import QuicConfiguration

async def main():
    options = QuicConfiguration(alpn_protocols=["echo"], verify_mode=ssl.CERT_NONE)
    data = os.urandom(300_000)
    async with connect({host!r}, 4433, configuration=options) as client:
        async def echo():
            reader, writer = await client.create_stream()
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
        await asyncio.gather(echo(), echo())
    print("same")

asyncio.run(main())
"""


@contextlib.asynccontextmanager
async def quic_server(there: aiotun.Namespace, host: str) -> AsyncIterator[None]:
    """Send back what comes on each stream."""
    server = pytest.importorskip("aioquic.asyncio.server", reason="missing: aioquic")
    configuration = pytest.importorskip("aioquic.quic.configuration")
    options = configuration.QuicConfiguration(is_client=False, alpn_protocols=["echo"])
    options.certificate, options.private_key = certificate()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()

    tasks: set[asyncio.Task[None]] = set()

    def on_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(echo(reader, writer)))

    transport, _ = await there.create_datagram_endpoint(
        lambda: server.QuicServer(configuration=options, stream_handler=on_stream),
        local_addr=(host, 4433),
    )
    try:
        yield
    finally:
        transport.close()
        for task in tasks:
            task.cancel()


def certificate() -> tuple[Any, Any]:
    """Make a certificate that nobody has to believe, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "echo")])
    begins = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    builder = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), begins, begins.replace(year=2100)
    )
    return builder.sign(key, hashes.SHA256()), key


@pytest.mark.parametrize("host", [NET4, NET6])
async def test_quic(host: str, internet: aiotun.Namespace) -> None:
    async with quic_server(internet, host):
        ended = await python(QUIC.format(host=host))
    assert (ended.status, ended.out) == (0, "same\n"), ended.err


# --- Interactive shells --------------------------------------------------------------------------

# The marks are not in the words that are typed, which the terminal shows, too.
STATUS = "echo st''atus $?\n"


def type_in(running: Running, text: str) -> None:
    running.out = ""
    os.write(running.out_fd, text.encode())


def sleeping() -> str:
    """Shell words that say that they run, and then sleep."""
    return f"{need('sh')} -c 'echo sle''eps; exec sleep 60'\n"


def test_an_interactive_shell_inside_has_job_control() -> None:
    with in_terminal("run", "--", need("bash"), "--norc", "-i") as running:
        type_in(running, sleeping())
        running.read_until("sleeps")
        type_in(running, "\x1a")  # Ctrl-Z
        running.read_until("Stopped")
        type_in(running, "jobs -r; echo e''nd\n")
        running.read_until("end")
        assert "sleep" not in running.out.partition("end")[0].partition("\n")[2]
        type_in(running, "fg\n")
        running.read_until("exec sleep")
        type_in(running, "\x03")  # Ctrl-C
        type_in(running, STATUS)
        running.read_until("status 130")
        type_in(running, "exit 3\n")
        assert running.end() == 3


def test_a_shell_outside_stops_and_continues_it() -> None:
    aiotun_run = " ".join([*COMMAND, "run", "--"])
    with in_terminal(command=[need("bash"), "--norc", "-i"]) as running:
        type_in(running, f"{aiotun_run} sh -c 'echo re''ady; read line; echo got $line; exit 7'\n")
        running.read_until("ready")
        type_in(running, "\x1a")
        running.read_until("Stopped")
        type_in(running, STATUS)
        running.read_until("status 148")  # 128 and SIGTSTP
        type_in(running, "fg\n")
        running.read_until("run --")
        type_in(running, "words\n")
        running.read_until("got words")
        type_in(running, STATUS)
        running.read_until("status 7")
        type_in(running, "exit\n")
        running.end()


# --- The services for names ----------------------------------------------------------------------

SERVICES = {
    "nscd": "nscd/socket",
    "resolve": "systemd/resolve/io.systemd.Resolve",
    "avahi": "avahi-daemon/socket",
}
# Lets a command have the /run and the /etc of a machine with these services. `/etc/resolv.conf` is
# a link, as systemd-resolved wants it.
MACHINE = """
set -e
mount -t tmpfs none /run
cp -r "$0" /run/services
for each in nscd systemd/resolve avahi-daemon; do
    mkdir -p /run/$each
    mount --bind "$0/$each" /run/$each
done
mkdir /run/etc
cp /etc/passwd /etc/group /etc/hosts /etc/ld.so.cache /run/etc
echo "hosts: files dns" >/run/etc/nsswitch.conf
mount --bind /run/etc /etc
ln -s ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf
exec "$@"
"""
ASK = f"""
import socket
for name, path in {SERVICES!r}.items():
    for folder in ("/run/", "/var/run/"):
        with socket.socket(socket.AF_UNIX) as sock:
            try:
                sock.connect(folder + path)
                print(name)
            except FileNotFoundError:
                pass
print(socket.gethostbyname("www.example.org"))
"""


@contextlib.asynccontextmanager
async def services(folder: Path) -> AsyncIterator[dict[str, int]]:
    """Services that give no answers, and count who asks."""
    asked = dict.fromkeys(SERVICES, 0)
    async with contextlib.AsyncExitStack() as stack:
        for name, path in SERVICES.items():

            def count(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
            ) -> None:
                asked[name] += 1
                writer.close()

            (folder / path).parent.mkdir(parents=True)
            server = await asyncio.start_unix_server(count, folder / path)
            await stack.enter_async_context(server)
        (folder / "systemd/resolve/stub-resolv.conf").write_text("nameserver 127.0.0.53\n")
        yield asked


async def test_no_service_outside_is_asked_for_names(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    transport, stub = await loop.create_datagram_endpoint(NameServer, ("127.0.0.53", 53))
    async with services(tmp_path) as asked:
        outer = [need("unshare"), "-m", need("sh"), "-c", MACHINE, str(tmp_path)]
        code = [sys.executable, "-c", ASK]
        # Outside they are there. The C library asks nscd, too, unless it was built without.
        outside = await outcome(*outer, *code)
        assert set(outside.out.split()) == {*SERVICES, NET4}, outside.err
        assert all(asked.values())
        before, names = dict(asked), len(stub.asked)
        inside = await run("--", *code, command=[*outer, *COMMAND])
    transport.close()
    assert inside.out.split() == [NET4], inside.err
    assert asked == before
    assert len(stub.asked) > names


STUB = "127.0.0.53"
ASK_BOTH = f"""
import socket
print(socket.gethostbyname("www.example.org"))
with socket.create_connection(({STUB!r}, 53), 10) as sock:
    sock.sendall(b"over TCP")
    sock.shutdown(socket.SHUT_WR)
    print(sock.makefile().read())
print(open("/etc/resolv.conf").readline())
"""


@pytest.mark.parametrize("user", ["root", "ordinary"])
async def test_where_mounts_are_refused_a_name_server_on_loopback_answers(
    user: str, tmp_path: Path
) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.read())
        writer.close()

    loop = asyncio.get_running_loop()
    transport, stub = await loop.create_datagram_endpoint(NameServer, (STUB, 53))
    outer = with_resolv_conf(tmp_path / "resolv.conf", f"nameserver {STUB}\n")
    command, inner, options = COMMAND, sys.executable, dict[str, Any]()
    if user == "ordinary":
        python_command, options["env"] = ordinary_python()
        command, inner = [*python_command, "-m", "aiotun"], python_command[-1]
    words = [*outer, *without_mount(), *command]
    async with await asyncio.start_server(echo, STUB, 53):
        ended = await run("--", inner, "-c", ASK_BOTH, command=words, **options)
    transport.close()
    assert ended.out.split("\n")[:3] == [NET4, "over TCP", f"nameserver {STUB}"], ended.err
    assert ended.err == ""
    assert stub.asked


async def test_where_mounts_are_refused_other_name_servers_are_carried(
    internet: aiotun.Namespace, tmp_path: Path
) -> None:
    transport, _ = await internet.create_datagram_endpoint(NameServer, local_addr=(NET4, 53))
    outer = with_resolv_conf(tmp_path / "resolv.conf", f"nameserver {NET4}\n")
    code = "import socket; print(socket.gethostbyname('www.example.org'))"
    options = ("--log", "--allow", "192.0.2.0/24")
    ended = await python(code, *options, command=[*outer, *without_mount(), *COMMAND])
    transport.close()
    assert ended.out == f"{NET4}\n", ended.err
    assert "refuses mounts" in ended.err
