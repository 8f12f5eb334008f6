"""How Sphinx builds the documentation; `make docs` runs it."""

import importlib.metadata
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for _extension

project = "aiotun"
author = "the aiotun authors"
release = version = importlib.metadata.version("aiotun")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "_extension",
]
exclude_patterns = ["_static"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "substitution"]
_links = importlib.metadata.metadata("aiotun").get_all("Project-URL") or []
_places = dict(each.split(", ", 1) for each in _links)
myst_substitutions = {
    "version": version,
    "places": f"[source]({_places['Source']}) and the [issues]({_places['Issues']})",
}
myst_heading_anchors = 3

# Docstrings write `recv`. If a public name matches, Sphinx makes it a link, and otherwise code.
default_role = "py:obj"
add_module_names = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Not autodoc_preserve_defaults: it looks for the defaults in the source, which has **options.
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Awaiting or entering it raises", "Raises"), ("Yields", "Returns")]
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"aiotun {version}"
html_static_path = ["_static"]
html_css_files = ["aiotun.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"
