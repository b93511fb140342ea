"""What tests of several processes share: a port to meet at, and the threads that torch's process groups left."""

import socket
from pathlib import Path


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def gloo_threads():
    """Names of this process's threads that belong to a process group, as Linux and torch 2.13 have them."""
    names = [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]
    return sorted(name for name in names if "gloo" in name)
