"""Only a part of pyroute2 is imported, and other users of pyroute2 notice no difference."""

import subprocess
import sys
import textwrap

import pytest

_IMPORTED = "import sys; from aiotun._link.pyroute import pyroute; ours = pyroute()\n"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-Werror", "-c", _IMPORTED + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_only_the_modules_for_rtnetlink_are_imported() -> None:
    loaded = set(run("print(*sys.modules)").split())
    assert "pyroute2.netlink.rtnl.ifinfmsg" in loaded
    unneeded = {"pyroute2.ndb", "pyroute2.ipdb", "pyroute2.ethtool", "pyroute2.conntrack"}
    assert loaded & unneeded == set()


@pytest.mark.parametrize(
    "use",
    [
        "import pyroute2; made = pyroute2.AsyncIPRoute",
        "from pyroute2 import AsyncIPRoute as made",
        "from pyroute2 import NDB, AsyncIPRoute as made",
        "import pyroute2.ndb.main; made = pyroute2.AsyncIPRoute",
        "import pyroute2; pyroute2.netlink.rtnl.rtmsg; made = pyroute2.AsyncIPRoute",
        "import pyroute2; pyroute2.dhcp; made = pyroute2.AsyncIPRoute",
    ],
)
def test_afterwards_pyroute2_is_as_always(use: str) -> None:
    assert run(f"{use}\nprint(made is ours.AsyncIPRoute)") == "True"


def test_afterwards_pyroute2_has_all_its_names() -> None:
    names = "print(*sorted(name for name in vars(pyroute2) if name != '__getattr__'))"
    asked = run(f"import pyroute2; pyroute2.__version__; {names}")
    whole = subprocess.check_output([sys.executable, "-c", f"import pyroute2; {names}"], text=True)
    assert set(whole.split()) <= set(asked.split())


def test_names_that_pyroute2_lacks_are_missing() -> None:
    run(
        """
        import pyroute2
        assert not hasattr(pyroute2, "__warningregistry__")  # which loads nothing
        assert "pyroute2.ndb" not in sys.modules
        assert not hasattr(pyroute2, "nothing")
        try:
            from pyroute2 import nothing
        except ImportError as error:
            assert "nothing" in str(error)
        else:
            raise AssertionError
        """
    )


def test_several_threads_may_be_the_first_to_use_pyroute2() -> None:
    printed = run(
        """
        import threading
        sys.setswitchinterval(1e-5)
        start, found = threading.Barrier(8), []

        def use(name):
            start.wait()
            import pyroute2
            found.append(getattr(pyroute2, name).__name__)

        names = ["NDB", "IPRoute", "IW", "NSPopen"] * 2
        threads = [threading.Thread(target=use, args=[name]) for name in names]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        print(*sorted(found))
        """
    )
    assert printed == "IPRoute IPRoute IW IW NDB NDB NSPopen NSPopen"


def test_a_program_that_uses_pyroute2_keeps_its_own() -> None:
    code = (
        f"import pyroute2; before = pyroute2; {_IMPORTED}print(sys.modules['pyroute2'] is before)"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"
