"""The sentences that docs/limits.md quotes are the package's own, and show what they leave to be filled in."""

import ast
import re
from pathlib import Path

import pytest

import fastscore

PAGE = Path(__file__).parent.parent / "docs" / "limits.md"
QUOTED = [" ".join(quote.replace("\n> ", " ").split()) for quote in re.findall(r"(?:^> .*\n)+", PAGE.read_text(), re.M)]


def said():
    """Return the strings of every module, one after the other as they stand there, without what f-strings fill in."""
    for path in sorted(Path(fastscore.__file__).parent.rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        nodes.sort(key=lambda node: (node.lineno, node.col_offset))  # the parts of one f-string keep their order
        yield "".join(node.value for node in nodes if isinstance(node.value, str))


SAID = " ".join(said())


@pytest.mark.parametrize("quote", QUOTED, ids=lambda quote: " ".join(quote.split()[1:6]))
def test_the_parts_of_a_sentence_are_the_package_s_own(quote):
    # \\<n> is a gap: without the backslash a browser takes it for a tag, and shows nothing.
    assert "<" not in quote.replace(r"\<", "")
    parts = re.split(r"\\<[^>]*>|[,;:.()]|\d+", quote.removeprefix("> ").removeprefix("the network "))
    parts = [part.strip() for part in parts if len(part.split()) > 2]
    assert parts
    assert [part for part in parts if part not in SAID] == []


def test_there_are_sentences():
    assert len(QUOTED) > 10
