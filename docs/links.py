"""Tell links that are dead from those that this machine cannot ask: `make docs-links` runs it on Sphinx's linkcheck.

An address that answers with an error is dead, and makes it fail. An address whose host gives no answer at all (no such
name, no connection, no answer in time) says as much about the network as about the link: it is listed, and that is all.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

NO_ANSWER = re.compile(
    r"NameResolutionError|NewConnectionError|ConnectTimeout|Connection(Error|Refused|Reset)|ProxyError"
)


def verdict(found: dict) -> str:
    """Return works, moved, dead, not reached or not asked, for a line of output.json."""
    status = found["status"]
    if status == "timeout" or (status == "broken" and NO_ANSWER.search(found["info"])):
        return "not reached"
    return {"working": "works", "redirected": "moved", "broken": "dead"}.get(status, "not asked")


def main(file: str) -> int:
    """Print the links that need a look and the counts; return 1 if one is dead."""
    links = defaultdict(list)
    for line in Path(file).read_text().splitlines():
        found = json.loads(line)
        links[verdict(found)].append(
            f"docs/{found['filename']}:{found['lineno']}  {found['uri']}  {found['info'][:80]}"
        )
    for kind in ("not reached", "moved", "dead"):
        print(*(f"{kind}: {link}" for link in sorted(links[kind])), sep="\n", end="\n" * bool(links[kind]))
    print(", ".join(f"{len(links[kind])} {kind}" for kind in ("works", "moved", "dead", "not reached", "not asked")))
    return bool(links["dead"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
