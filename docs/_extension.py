"""A Sphinx extension: checks that the reference is complete, and shows texts of the programs."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import inspect
import io
import os
import re
import textwrap
from abc import ABC
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import aiotun
from aiotun import cli

# The modules that users import from. The reference must have every public name in them.
PUBLIC = (
    "aiotun",
    "aiotun.capture",
    "aiotun.datagrams",
    "aiotun.netstack",
    "aiotun.offload",
    "aiotun.reply",
    "aiotun.runs",
    "aiotun.testing",
)

# Internal methods that other modules of aiotun call, so they have no underscore.
INTERNAL = (
    "aiotun.Queue.take",
    "aiotun.Queue.watch",
    "aiotun.netstack.Server.is_of",
    "aiotun.runs.Pool.put",
    "aiotun.runs.Pool.replace",
    "aiotun.runs.Pool.wake",
)

# Classes whose objects come from aiotun. How aiotun makes them is nobody's business.
MADE_BY_AIOTUN = (
    "Capture",
    "DatagramOpener",
    "DatagramSocket",
    "Device",
    "DeviceTransport",
    "LinkEvents",
    "Namespace",
    "NamespaceOpener",
    "Netstack",
    "NetstackOpener",
    "Opener",
    "Queue",
    "Run",
    "Server",
    "TapDevice",
    "TunDevice",
    "UdpFlow",
)

logger = logging.getLogger(__name__)


def public_names() -> list[str]:
    """List the full names of all public functions and classes, and of the classes' own members."""
    names: list[str] = []
    for module_name in PUBLIC:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            if module_name != "aiotun" and getattr(aiotun, name, None) is value:
                continue  # described under its shorter name
            names.append(f"{module_name}.{name}")
            if inspect.isclass(value):
                names += [
                    f"{module_name}.{name}.{member}"
                    for member, inside in own_members(value).items()
                    if not member.startswith("_")
                    and (inspect.isfunction(inside) or isinstance(inside, classmethod | property))
                    and f"{module_name}.{name}.{member}" not in INTERNAL
                ]
    return names


def own_members(value: type) -> dict[str, object]:
    """The members of a class, with those of an internal base, which has no page of its own."""
    if not value.__bases__[0].__module__.startswith("aiotun._netstack"):
        return dict(vars(value))
    return {**vars(value.__bases__[0]), **vars(value)}


def check(app: Sphinx, env: BuildEnvironment) -> None:
    objects = env.get_domain("py").objects
    for name in public_names():
        if name not in objects:
            # Device.recv implements PacketIO.recv, which the reference describes.
            owner, _, member = name.rpartition(".")
            if (
                owner in ("aiotun.Device", "aiotun.Queue")
                and f"aiotun.PacketIO.{member}" in objects
            ):
                continue
            logger.warning("%s is missing from docs/reference", name)


@functools.cache
def known_names() -> dict[str, str]:
    """Map each name that a page may use for a public object to its full name."""
    known: dict[str, str] = {}
    for full in public_names():
        module = next(
            each for each in sorted(PUBLIC, key=len, reverse=True) if full.startswith(each)
        )
        short = full.removeprefix(f"{module}.")
        known.setdefault(short, full)
        known[full] = full
        # A page may write the packet methods without a class: `recv`.
        if short.startswith("PacketIO."):
            known.setdefault(short.removeprefix("PacketIO."), full)
    return known


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Turn names such as `open_tun` in the pages into links, as in docstrings."""
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
    """Resolve names such as `TunDevice` in docstrings of every module."""
    full = known_names().get(node["reftarget"])
    if full is None or node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", full, node, content)


def shorten_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returned: str | None,
) -> tuple[str, str | None] | None:
    """Show no arguments for classes that users don't call, and the alias `NetnsArg` as that."""
    if what == "class" and name.split(".")[-1] in MADE_BY_AIOTUN:
        return "", None
    if signature is None:
        return None
    netns = r"str \| \S*PathLike\[str\] \| int \| \S*_HasFileno"
    signature = re.sub(netns, "NetnsArg", signature)
    if internal := re.search(r"\b_[A-Z]\w*", signature):
        logger.warning("%s shows the internal name %s", name, internal[0])
    return signature, returned


def show_public_bases(
    app: Sphinx, name: str, obj: object, options: object, bases: list[type]
) -> None:
    """Show the nearest public class in place of an internal one."""
    known = known_names()

    def is_shown(base: type) -> bool:
        ours = base.__module__.startswith("aiotun")
        return base.__name__ in known if ours else base is not ABC

    lines = [inspect.getmro(base) if inspect.isclass(base) else (object,) for base in bases]
    bases[:] = dict.fromkeys(next(filter(is_shown, line)) for line in lines)


def hide_object(app: Sphinx, doctree: nodes.document) -> None:
    """Remove the lines that say that a class derives from `object`."""
    for paragraph in list(doctree.findall(nodes.paragraph)):
        if paragraph.astext() == "Bases: object":
            paragraph.parent.remove(paragraph)


def keep_colons(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep a sentence such as "This: that" as it is; napoleon would take "This" for a type."""
    if what in ("attribute", "data", "property") and lines and ":" in lines[0]:
        lines[0] = f": {lines[0]}"
    for place, line in enumerate(lines[:-1]):
        if line.strip() in ("Returns:", "Yields:"):
            text = lines[place + 1]
            lines[place + 1] = text[: len(text) - len(text.lstrip())] + ": " + text.lstrip()


class SaysOfItself(SphinxDirective):
    """Shows the docstring of a Python file. Indented parts become code blocks."""

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
                paragraph["support_smartquotes"] = False  # keeps the dashes of --name
                found.append(paragraph)
        return found


class HelpOf(SphinxDirective):
    """Shows what ``aiotun help COMMAND`` prints."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "80"  # argparse reads it
        with contextlib.redirect_stdout(io.StringIO()) as said:
            cli.main(["help", self.arguments[0]])
        text = said.getvalue()
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("says-of-itself", SaysOfItself)
    app.add_directive("help-of", HelpOf)
    app.connect("doctree-read", link_names)
    app.connect("doctree-read", hide_object)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon is at 500
    app.connect("missing-reference", find_elsewhere)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
