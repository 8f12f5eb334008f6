"""A WireGuard peer, as wg-quick(8) would set it up from the same file.

    sudo python examples/wireguard wg0.conf --name wg0 &
    sudo wg show wg0

Without root, for one program or for all that use a proxy (SOCKS5, and HTTP's CONNECT):

    python examples/wireguard wg0.conf -- curl https://example.org
    python examples/wireguard wg0.conf --proxy 127.0.0.1:1080

Nothing else on the machine is touched then. Names are asked of the file's DNS servers, through the
tunnel.

Needs `cryptography` (pip install 'aiotun[examples]'). Prints "ready NAME" when it serves, and ends
cleanly on SIGINT and SIGTERM. At SIGUSR1 it prints the output of `wg show` and the counts of
dropped messages on stderr.

It ignores the file's DNS and commands, with a note, and makes no route for an AllowedIPs that
covers everything. At the start it tries to resolve a peer's name as often as wg(8) does. Unlike the
kernel, it leaves the source address of answers to the routing table. It looks the name up again
after three handshakes without an answer, and tries the addresses in turn, IPv4 and IPv6.
"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    # When a folder is run, Python looks for modules in that folder. Look in its parent.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from _running import run

    from wireguard.config import ConfigError, read
    from wireguard.peer import Timers
    from wireguard.private import serve_command, serve_proxy
    from wireguard.service import Options, serve

    parser = argparse.ArgumentParser(
        prog="wireguard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="wg-quick's configuration file")
    parser.add_argument("--name", help="the interface's name (default: the file's)")
    parser.add_argument("--control", type=Path, help="the control socket (default: where wg looks)")
    parser.add_argument("--proxy", metavar="HOST:PORT", help="offer a proxy into the tunnel here")
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    said = "run this in the tunnel"
    parser.add_argument("command", nargs="*", default=[], metavar="COMMAND", help=said)
    parser.add_argument(
        "--handshakes",
        type=int,
        default=100,
        help="handshakes a second that need no cookie (default: 100)",
    )
    timers = parser.add_argument_group("timers", "section 6.1 of the paper, in seconds; for tests")
    standard = Timers()
    for name in vars(standard):
        timers.add_argument(
            f"--{name.replace('_', '-')}", type=float, default=getattr(standard, name), metavar="S"
        )
    # argparse would refuse a command that comes after CONFIG and options.
    words, after = sys.argv[1:], list[str]()
    if "--" in words:
        place = words.index("--")
        words, after = words[:place], words[place + 1 :]
    options = parser.parse_args(words, namespace=Options())
    options.timers = Timers(**{name: getattr(options, name) for name in vars(standard)})
    path: Path = options.config  # type: ignore[attr-defined]  # given by argparse
    options.name = options.name or path.stem
    try:
        config = read(path)
    except (ConfigError, OSError) as error:
        said = getattr(error, "strerror", None) or str(error)
        print(f"wireguard: {path}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while a peer's name can't be resolved
        return 130
    uvloop: bool = options.uvloop  # type: ignore[attr-defined]
    command: list[str] = options.command + after  # type: ignore[attr-defined]
    proxy: str | None = options.proxy  # type: ignore[attr-defined]
    if command and proxy:
        parser.error("give either --proxy or a COMMAND")
    if command:
        return run(serve_command(config, options, command), uvloop)
    if proxy:
        host, _, port = proxy.rpartition(":")
        if not port.isdecimal() or int(port) > 65535:
            parser.error(f"--proxy {proxy} is not HOST:PORT")
        return run(serve_proxy(config, options, host.strip("[]") or "127.0.0.1", int(port)), uvloop)
    return run(serve(config, options), uvloop)


if __name__ == "__main__":
    sys.exit(main())
