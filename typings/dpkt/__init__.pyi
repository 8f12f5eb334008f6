# What aiotun, its tests and its examples use of dpkt 1.9.8, which has no types of its own: it makes
# its classes' fields at run time, where no checker sees them. Not installed with aiotun: two
# packages that bring types for a third would be in each other's way. Copy this folder into a
# project's own `typings`, and pyright, which otherwise knows no field of any dpkt object, does.

from typing import Any

from . import arp as arp
from . import ethernet as ethernet
from . import icmp as icmp
from . import icmp6 as icmp6
from . import ip as ip
from . import ip6 as ip6
from . import llc as llc
from . import tcp as tcp
from . import udp as udp
from .dpkt import Error as Error
from .dpkt import NeedData as NeedData
from .dpkt import PackError as PackError
from .dpkt import Packet as Packet
from .dpkt import UnpackError as UnpackError

def __getattr__(name: str) -> Any: ...  # all other protocols
