"""The processes of one run, as torchrun starts them: who does what, and the few moments at which they meet.

Processes meet through gloo, on the CPU, whatever device they work on. A process that ends without leaving, killed for
instance, closes its connections: the others get an error at their next meeting instead of waiting, and torchrun ends
them before that.

gloo's threads end with the last reference to their group. One that still runs while Python shuts down can abort the
process with SIGABRT after all is done, so `Ranks` gives its group up when the block ends, and nobody else gets one.

References:
    torchrun (Elastic Launch), https://docs.pytorch.org/docs/stable/elastic/run.html
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import NoReturn, TypeVar

import torch.distributed as dist

if dist.is_available():
    # Its default arguments hold the default group of the moment when something imports it: let there be none.
    import torch.distributed.nn  # noqa: F401

T = TypeVar("T")
JOINING = timedelta(minutes=5)
# Between two meetings lies a rank's whole share of the work; nobody waits for a dead one (see above).
PATIENCE = timedelta(days=365)


def of_default_group() -> tuple[int, int]:
    """Return the rank in torch.distributed's default group and its size; (0, 1) where there is no group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


class OtherRankFailed(RuntimeError):
    """Another process of the run failed, and says why itself."""


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End the run as Ctrl-C does, once."""
    _ignore_sigterm()
    raise KeyboardInterrupt


def _ignore_sigterm() -> None:
    """Let no SIGTERM interrupt what is said at the end of a run: torchrun sends one because the run ends."""
    if threading.current_thread() is threading.main_thread():  # elsewhere Python has no signals
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass
class Ranks:
    """This process among those of a run.

    Arguments:
        rank: its number, 0 .. size - 1.
        size: how many there are.
        local: its number on its own machine, which chooses a GPU.
        group: the process group that they meet in.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    @contextmanager
    def of_environment(cls) -> Iterator[Ranks]:
        """Join the processes that torchrun started, inside the block; one process where there is no torchrun.

        Raises:
            ConnectionError: if they do not find each other.
        """
        rank, size, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if size == 1:
            yield cls()
            return
        try:
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=JOINING)
            ranks = cls(rank, size, local, dist.new_group(backend="gloo", timeout=PATIENCE))
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConnectionError(
                f"rank {rank} of {size} does not reach the others at {where}: {str(error).splitlines()[0]}; start all "
                "of them with one torchrun"
            ) from error
        # torchrun ends the others with SIGTERM when one has failed: what is kept is said as after Ctrl-C.
        signal.signal(signal.SIGTERM, _end)
        try:
            yield ranks
        finally:
            ranks.group = None
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of the work, equal for all but for one piece."""
        return work[self.rank :: self.size]

    def gather(self, do: Callable[[], T]) -> list[T]:
        """Let every rank do something, and return all results in the order of ranks; if one fails, all do.

        Raises:
            Exception: what `do` raised, on the lowest rank where it failed.
            OtherRankFailed: on all other ranks, or if a process is gone.
        """
        if self.size == 1:
            return [do()]
        result, own = None, None
        try:
            result = do()
        except Exception as error:
            own = error
        found: list = [None] * self.size
        try:
            dist.all_gather_object(found, (result, own is not None), group=self.group)
        except RuntimeError as error:
            _ignore_sigterm()
            raise own or OtherRankFailed(f"rank {self.rank}: another process is gone") from error
        failed = [rank for rank, (_, failed) in enumerate(found) if failed]
        if own is not None and failed[0] == self.rank:
            raise own
        if failed:
            raise OtherRankFailed(f"rank {self.rank}: rank {failed[0]} failed")
        return [value for value, _ in found]

    def on_first(self, do: Callable[[], T]) -> T:
        """Let rank 0 do something for all, and return its result; if it fails, all do, as in `gather`."""
        return self.gather(do if self.first else lambda: None)[0]
