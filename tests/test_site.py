"""The site's reference names everything that people import; `make docs` builds it with warnings as errors."""

import re
from pathlib import Path

import fastscore as fs

DOCS = Path(__file__).parent.parent / "docs"


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in sorted((DOCS / "api").glob("*.md")))
    named = re.findall(r"autoclass:: (\w+)|autofunction:: (\w+)", pages)
    assert sorted(one or other for one, other in named) == sorted(fs.__all__)
    assert "fastscore.adapters" in pages
    assert ":imported-members:" in pages  # all of them


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text()
    listed = [line for block in re.findall(r"```{toctree}\n(.*?)```", index, re.DOTALL) for line in block.split("\n")]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} - {"index"}
    assert {line for line in listed if line and not line.startswith(":")} == pages
