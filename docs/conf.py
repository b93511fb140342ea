"""The site of the documentation: `make docs` builds it, and warnings are errors."""

from __future__ import annotations

import re
from importlib.metadata import version as version_of
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

project = "fastscore"
copyright = "the authors of fastscore, Apache-2.0"
release = version = version_of("fastscore")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx-mathjax-offline"]  # formulas without the web
html_theme = "furo"
html_title = "fastscore"
html_static_path = ["static"]
html_css_files = ["output.css"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings say shapes and dtypes beside them
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_use_rtype = False
linkcheck_ignore = [r"https://doi\.org/10\.1214"]  # answers programs with a question

DOCS = Path(__file__).parent
# A star before one of these names is Python's, and no emphasis.
STARRED = re.compile(r"(?<!\*)(\*{1,2})(?=(?:shape|named|cond|options)\b)")


class FilesOfTheRepository(SphinxTransform):
    """A link to a file that is no page of the site becomes the file's name."""

    default_priority = 10

    def apply(self, **kwargs: object) -> None:
        for link in list(self.document.findall(pending_xref)):
            named = link.get("reftarget", "")
            # The README stands in the folder above, and is included in a page.
            target = (Path(self.document["source"]).parent / named).resolve()
            for file in (target, target.with_suffix(".md"), (DOCS.parent / named).resolve()):
                if file.is_file() and DOCS not in file.parents:
                    name = str(file.relative_to(DOCS.parent))
                    link.replace_self(nodes.literal(name, name))
                    break


def escape_stars(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Keep Python's stars in docstrings from being read as emphasis."""
    lines[:] = [STARRED.sub(lambda match: "".join(f"\\{star}" for star in match[1]), line) for line in lines]


def setup(app: Sphinx) -> None:
    """Add both to Sphinx."""
    app.add_transform(FilesOfTheRepository)
    app.connect("autodoc-process-docstring", escape_stars)
