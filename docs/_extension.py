"""For Sphinx: a check that the reference has every public name, and docstrings of the examples."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
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


@functools.cache
def known_names() -> dict[str, str]:
    """What a page may call a public name, and its full name."""
    known: dict[str, str] = {}
    for full in public_names():
        module = next(
            each for each in sorted(PUBLIC, key=len, reverse=True) if full.startswith(each)
        )
        short = full.removeprefix(f"{module}.")
        known.setdefault(short, full)
        known[full] = full
        # Of methods the packet methods may be called by their name alone.
        if short.startswith("PacketIO."):
            known.setdefault(short.removeprefix("PacketIO."), full)
    return known


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """In the pages make `open_tun` a link, as it is in docstrings."""
    known = known_names()
    for literal in list(doctree.findall(nodes.literal)):
        full = known.get(literal.astext().removesuffix("()"))
        if full is None or isinstance(literal.parent, nodes.reference | addnodes.pending_xref):
            continue
        link = addnodes.pending_xref(
            "", refdomain="py", reftype="obj", reftarget=full, refdoc=app.env.docname, refwarn=False
        )
        literal.replace_self(link)
        link += literal


def find_elsewhere(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """In docstrings of other modules find `TunDevice`, too."""
    full = known_names().get(node["reftarget"])
    if full is None or node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, content)


def keep_colons(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Let "This: that" be a sentence where napoleon would take "This" for a type."""
    if what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines[0] = f": {lines[0]}"
    for place, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            text = lines[place + 1]
            lines[place + 1] = text[: len(text) - len(text.lstrip())] + ": " + text.lstrip()


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
                paragraph = nodes.paragraph("", " ".join(part.split()))
                paragraph["support_smartquotes"] = False  # --name shall keep its dashes
                found.append(paragraph)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("says-of-itself", SaysOfItself)
    app.connect("doctree-read", link_names)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon is at 500
    app.connect("missing-reference", find_elsewhere)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
