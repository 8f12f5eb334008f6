"""The texts of ``aiotun help``.

They are apart from the commands' modules, so that a command does not import the others.
"""

import textwrap

__all__ = [
    "ADDED",
    "DELETED",
    "DEMO",
    "DOCTOR",
    "DUMP",
    "DUMPED",
    "LISTED",
    "UNITS",
]

DEMO = """\
Creates a TUN device in a private network namespace, and answers the pings that it sends there.

It needs no root and leaves nothing behind: the device, its addresses and its routes disappear with
the namespace, and the namespace disappears when the demo ends.
"""

DOCTOR = """\
Checks what this user can do with aiotun on this machine, and says how to fix what fails.

It changes nothing on the machine: to see whether a device can be created, it creates one for a
moment in a private network namespace. The exit status is 0 if this user can open a device in some
way, and 1 if not.
"""

DUMP = """\
Shows the packets of an interface, one line each.

With IFACE, dump listens on an existing interface and does not disturb the program that holds it.
'In' and 'Out' are as the interface sees them: what the program reads from a TUN device is 'Out'.
With --new, dump opens a device itself and shows what the kernel sends through it, without
answering. These packets are 'In', because this program receives them.
"""

# The words of `aiotun add` and `aiotun networkd`, one a line.
_TUNTAP_WORDS = """\
dev NAME         the device; 'dev' may be left out
mode tun | tap   IP packets, or Ethernet frames
user USER        a user who may attach without privilege, by name or number
group GROUP      a group whose members may attach without privilege
multi_queue      up to 256 queues instead of one
pi               a 4-byte packet-info header in front of each packet
vnet_hdr         a virtio-net header in front of each packet
ipv6_autoconf on | off
                 whether the kernel adds a link-local address and solicits
                 routers
netns NAME       the network namespace: a name under /run/netns, or a path
"""
_NETWORKD_WORDS = """\
dev NAME         the device; 'dev' may be left out
mode tun | tap   IP packets (the default), or Ethernet frames
user USER        a user who may attach without privilege, by name or number
group GROUP      a group whose members may attach without privilege
multi_queue      up to 256 queues instead of one
pi               a 4-byte packet-info header in front of each packet
vnet_hdr         a virtio-net header in front of each packet
mtu BYTES        the size of the largest IP packet
address A/LEN [peer B/LEN]
                 an address; may be repeated
route DST [via GATEWAY [onlink]] [metric N] [table N]
                 a route; may be repeated
mac MAC          the MAC address of the TAP device
bridge NAME      the bridge that the TAP device joins
ipv6_autoconf on | off
                 whether the kernel adds a link-local address and solicits
                 routers
down             do not bring the link up
"""

LISTED = """\
Each line is one device, in the words of 'aiotun add'. 'attached' at the end
means that a program has the device open:

  tap0: tap multi_queue persist user 1000 attached
"""
ADDED = f"""\
words, in any order:
{textwrap.indent(_TUNTAP_WORDS, "  ")}
The device exists until it is deleted. It is down and has no address: the
program that opens it may change that, or ip(8). Without a name, or with a
pattern such as 'vpn%d', the kernel picks the name, and the command prints it.

examples:

  aiotun add dev tap0 mode tap user joe
  name=$(aiotun add mode tun user joe)
"""
DELETED = """\
A user who may open a device may delete it, so its owner needs no privilege. A
device that a program has open is not deleted. The mode is optional; if you
give it, it must be the device's.
"""

UNITS = f"""\
words, in any order:
{textwrap.indent(_NETWORKD_WORDS, "  ")}
The user and group need not exist on this machine. A word for which
systemd-networkd has no setting is refused, and the error says what to do.

examples:

  aiotun networkd tun0 user joe mtu 1400 address 10.0.0.1/24 \\
      route 10.2.0.0/16 via 10.0.0.2
  sudo "$(command -v aiotun)" networkd tap0 mode tap bridge br0 \\
      --write /etc/systemd/network
  sudo networkctl reload
"""

DUMPED = """\
examples:

  aiotun dump tun0 --write tun0.pcapng
  aiotun dump eth0 --write - | tshark -r -
  unshare -rn aiotun dump --new tun0 --address 10.0.0.1/24
"""
