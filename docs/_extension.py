"""For Sphinx: a check that the reference has every public name, and docstrings of the examples."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

# The modules that a user imports from; all that they call public is to be in the reference.
PUBLIC = ("aiotun", "aiotun.capture", "aiotun.offload", "aiotun.reply", "aiotun.testing")

# Without an underscore, for the sake of other modules of aiotun.
INTERNAL = ("aiotun.Queue.kind_for", "aiotun.Queue.end_free")

logger = logging.getLogger(__name__)


def public_names() -> list[str]:
    """Every public function and class, and what the classes have of their own."""
    names: list[str] = []
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            names.append(f"{module_name}.{name}")
            if inspect.isclass(value):
                names += [
                    f"{module_name}.{name}.{member}"
                    for member, inside in vars(value).items()
                    if not member.startswith("_")
                    and (inspect.isfunction(inside) or isinstance(inside, classmethod | property))
                    and f"{module_name}.{name}.{member}" not in INTERNAL
                ]
    return names


def check(app: Sphinx, env: BuildEnvironment) -> None:
    objects = env.get_domain("py").objects
    for name in public_names():
        if name not in objects:
            # Device.recv is PacketIO.recv once more, and is described there.
            owner, _, member = name.rpartition(".")
            if (
                owner in ("aiotun.Device", "aiotun.Queue")
                and f"aiotun.PacketIO.{member}" in objects
            ):
                continue
            logger.warning("%s is missing from docs/reference", name)


class SaysOfItself(SphinxDirective):
    """The docstring of a Python file: paragraphs, and indented what is to be typed."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path(self.env.srcdir, self.arguments[0])
        self.env.note_dependency(str(path))
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        found: list[nodes.Node] = []
        for part in re.split(r"\n\n", text):
            if part.startswith(" "):
                code = textwrap.dedent(part)
                found.append(nodes.literal_block(code, code, language="text"))
            else:
                found.append(nodes.paragraph("", " ".join(part.split())))
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("says-of-itself", SaysOfItself)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
