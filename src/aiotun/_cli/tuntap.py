"""``aiotun list``, ``add`` and ``del``: what ``ip tuntap`` does, in the same words.

Each function takes the words of the command line and returns the lines to print.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Literal

import aiotun

from .arguments import UsageError, number_or_name, on_or_off, read

__all__ = ["add", "delete", "show"]

_VALUES = ("dev", "name", "mode", "user", "group", "ipv6_autoconf", "netns")
# one_queue has had no effect since Linux 3.8, but ip(8) still accepts it.
_FLAGS = ("multi_queue", "pi", "vnet_hdr", "one_queue")


def add(words: Sequence[str]) -> list[str]:
    """Create a persistent device. Returns its name if the kernel picked the name.

    Raises:
        UsageError: a word is wrong or missing.
        AiotunError: as `create_persistent`.
    """
    said = read("add", words, _VALUES, _FLAGS)
    values, flags = said.values, said.flags
    if "mode" not in values:
        raise UsageError("the device's mode is missing; give 'mode tun' or 'mode tap'")
    name = values.get("dev")
    try:
        made = asyncio.run(
            aiotun.create_persistent(
                name,
                _mode(values["mode"]),
                multi_queue="multi_queue" in flags,
                owner=_who(values, "user"),
                group=_who(values, "group"),
                vnet_header="vnet_hdr" in flags,
                packet_info="pi" in flags,
                netns=values.get("netns"),
                ipv6_autoconf=on_or_off("ipv6_autoconf", values.get("ipv6_autoconf")),
            )
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    return [] if made == name else [made]


def delete(words: Sequence[str]) -> list[str]:
    """Delete a device. The mode is optional; if it is given, it must be the device's.

    Raises:
        UsageError: a word is wrong or missing.
        AiotunError: as `delete_persistent`, or the device is of the other kind.
    """
    # ip(8) deletes a multi-queue device only with the word multi_queue. We look it up instead.
    values = read("del", words, ("dev", "name", "mode", "netns"), _FLAGS).values
    if "dev" not in values:
        raise UsageError("the device's name is missing; give 'dev NAME'")
    name, netns = values["dev"], values.get("netns")
    mode = _mode(values["mode"]) if "mode" in values else None

    async def deleting() -> None:
        for device in await aiotun.list_devices(netns) if mode else ():
            if device.name == name and device.mode != mode:
                raise aiotun.AiotunError(
                    f"{name} is a {device.mode.upper()} device and was not deleted; "
                    f"give 'mode {device.mode}' or leave the mode out"
                )
        await aiotun.delete_persistent(name, netns)

    try:
        asyncio.run(deleting())
    except ValueError as error:
        raise UsageError(str(error)) from error
    return []


def show(words: Sequence[str], *, as_json: bool) -> list[str]:
    """List the devices, persistent or not, in the words of ``ip tuntap``, or everything as JSON.

    Raises:
        UsageError: a word is wrong.
        AiotunError: as `list_devices`, or there is no such device.
    """
    values = read("list", words, ("dev", "name", "netns")).values
    try:
        devices = asyncio.run(aiotun.list_devices(values.get("netns")))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if (name := values.get("dev")) is not None:
        devices = [device for device in devices if device.name == name]
        if not devices:
            raise aiotun.AiotunError(f"there is no TUN or TAP device {name}; see 'aiotun list'")
    if as_json:
        import dataclasses

        return [json.dumps([dataclasses.asdict(device) for device in devices], indent=2)]
    return [_line(device) for device in devices]


def _line(device: "aiotun.TunTapInfo") -> str:
    words = [f"{device.name}:", device.mode]
    for said, word in (
        (device.packet_info, "pi"),
        (device.multi_queue, "multi_queue"),
        (device.vnet_header, "vnet_hdr"),
        (device.persist, "persist"),
        (device.owner is not None, f"user {device.owner}"),
        (device.group is not None, f"group {device.group}"),
        # Last, as it is our addition: ip(8) shows attached programs only with -d.
        (device.attached, "attached"),
    ):
        if said:
            words.append(word)
    return " ".join(words)


def _mode(word: str) -> Literal["tun", "tap"]:
    if word == "tun":
        return "tun"
    if word == "tap":
        return "tap"
    raise UsageError(f"'mode' must be 'tun' or 'tap', got {word!r}")


def _who(values: dict[str, str], word: str) -> int | str | None:
    return number_or_name(values[word]) if word in values else None
