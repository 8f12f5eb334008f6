"""Runs one target under atheris: libFuzzer, guided by the branches that Python takes.

python -m fuzz._guided TARGET [libFuzzer's options and corpora]

It needs its own process, because libFuzzer never returns, and exits at the first finding.
"""

import importlib
import sys

import atheris

# The modules whose branches guide the search, for each target. atheris instruments code when it is
# imported, so this table must be known before the targets are imported. It names no more modules
# than needed, because instrumenting takes time.
_MODULES = {
    "decode": ["aiotun.decode", "aiotun._packets.encode", "dpkt"],
    "header": ["aiotun._packets.ipheader"],
    "reply": ["aiotun.reply"],
    "datagrams": ["aiotun._packets.udp", "aiotun._packets.fragments", "aiotun._netstack.pings"],
    "describe": ["aiotun._cli.describe"],
    "vnet-header": ["aiotun.offload"],
    "find": ["aiotun._packets.native", "aiotun._packets.ipheader"],
    "split": ["aiotun._packets.gso"],
    "merge": ["aiotun._packets.gso"],
    "run": ["aiotun._packets.runs", "aiotun._packets.gso"],
    "send-run": ["aiotun._packets.native"],
    "segmenting": ["aiotun._packets.gso"],
    "dhcp": ["_dhcp_frames", "_dhcp_message", "_dhcp_rules"],
    "vxlan": ["vxlan"],
    "switch": ["virtual_switch", "_switching"],
    "wireguard": ["wireguard"],
    "udp-vpn": ["udp_vpn"],
    "mss": ["_mss"],
    "wireguard-config": ["wireguard"],
    "vpn-keys": ["udp_vpn"],
    "options": ["aiotun._link.values", "virtual_switch"],
    "networkd": [
        "aiotun._cli.networkd",
        "aiotun._cli.arguments",
        "aiotun.networkd",
        "aiotun._device.options",
        "aiotun._link.values",
    ],
    "commands": ["aiotun._cli.tuntap", "aiotun._cli.arguments"],
}


def main(name: str, *options: str) -> None:
    with atheris.instrument_imports(include=_MODULES[name]):
        from .targets import TARGETS

        for module in _MODULES[name]:  # some are imported lazily, so import all of them now
            importlib.import_module(module)
    atheris.Setup([name, *options], TARGETS[name].check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
