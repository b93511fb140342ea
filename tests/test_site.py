"""The site's reference names everything that people import; `make docs` builds it with warnings as errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastscore as fs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Those of the site, and those beside them that people read.
FOLDERS = "benchmarks", "csrc", "examples"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / name / "README.md" for name in FOLDERS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_finds_it_and_its_heading(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", page.read_text(), flags=re.S)
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose):
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else []
        assert not heading or heading in [re.sub(r"[^\w\- ]", "", h).lower().replace(" ", "-") for h in headings], link


def test_a_dead_link_fails_and_one_that_is_not_reached_is_told_apart(tmp_path):
    def line(status, info):
        found = {"filename": "a.md", "lineno": 1, "uri": "https://x.org", "status": status, "info": info}
        return json.dumps(found) + "\n"

    def told(*lines):
        (tmp_path / "output.json").write_text("".join(lines))
        command = [sys.executable, DOCS / "links.py", tmp_path / "output.json"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()[-1]

    unreached = line("broken", "Max retries (Caused by NameResolutionError(...))"), line("timeout", "read timed out")
    dead = line("broken", "404 Client Error: Not Found for url: https://x.org")
    fine = line("working", ""), line("redirected", "https://y.org"), line("ignored", "")
    assert told(*unreached, *fine) == (0, "1 works, 1 moved, 0 dead, 2 not reached, 1 not asked")
    assert told(*unreached, dead) == (1, "0 works, 0 moved, 1 dead, 2 not reached, 0 not asked")


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


def test_nobody_is_sent_to_a_package_that_is_not_this_one():
    # PyPI has another project of this name, whose extras are other ones.
    sources = [*(ROOT / "fastscore").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *PAGES]
    found = [path for path in sources if re.search(r"pip install .?fastscore", path.read_text())]
    assert not found
