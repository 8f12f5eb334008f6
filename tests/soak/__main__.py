"""Start the soak in private namespaces; see `make soak`."""

import argparse
import random
import sys

from aiotun import NotPermittedError
from aiotun.testing import isolated_run

from .planting import PLANTS
from .running import soak


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=(__doc__ or "").strip())
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--round", type=float, default=60.0, metavar="SECONDS",
                        help="how long devices live (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rate", type=float, default=100.0, help="datagrams a second and flow")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--plant", choices=PLANTS, help="a fault that the soak has to find")
    args = parser.parse_args()
    try:
        return isolated_run(soak, args.minutes * 60, args.round, args.rate, args.seed, args.plant)
    except NotPermittedError as error:
        print(f"aiotun soak: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
