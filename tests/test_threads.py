"""Threads that use the package at once; torch.export, which traces networks, is not made for them."""

import sys
import threading

import torch
from torch import nn

import fastscore as fs
from fastscore.program import row_program as program
from fastscore.program.row_program import Programs
from fastscore.support.untouched import uncompiled


class InTime(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net(x) + t[:, None].to(x.dtype)


def test_threads_that_trace_at_once_do_not_disturb_each_other():
    found, errors = [], []

    def one(width):
        try:
            net = nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, 4)).eval()
            density = fs.ScoreDensity(InTime(net), fs.VP(), "eps", program=True)
            for _ in range(4):
                density._programs = Programs(True)
                found.append(float(density.estimate(torch.ones(3, 4), nfe=16).log_prob.sum()))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(8 + i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 24


def test_threads_that_look_into_networks_at_once_leave_torch_compile_as_it_was():
    """Each would put back what it found, and the second finds what the first has made."""
    compiled = torch.compile(lambda x: x + torch.compiler.is_compiling(), backend="eager")
    inside, may_leave = threading.Event(), threading.Event()

    def second():
        with uncompiled():
            inside.set()
            may_leave.wait()

    other = threading.Thread(target=second)
    with uncompiled():
        other.start()
        inside.wait()
    may_leave.set()
    other.join()
    assert compiled(torch.zeros(())) == 1


def test_a_trace_is_alone_until_its_symbolic_sizes_are_compared(monkeypatch):
    free, match = [], program.match

    def try_lock():
        free.append(program.ONE_AT_A_TIME.acquire(blocking=False))
        if free[-1]:
            program.ONE_AT_A_TIME.release()

    def watched(traced):
        other = threading.Thread(target=try_lock)
        other.start()
        other.join()
        return match(traced)

    monkeypatch.setattr(program, "match", watched)
    fs.ScoreDensity(InTime(nn.Linear(4, 4)).eval(), fs.VP(), "eps", program=True).estimate(torch.ones(1, 4), nfe=16)
    assert free == [False]


def test_what_another_thread_prints_during_a_trace_is_not_lost(monkeypatch, capsys):
    export, streams = torch.export.export, []

    def talkative(*args, **kwargs):
        print("the tracer", file=sys.stderr)
        other = threading.Thread(target=lambda: (streams.append(sys.stderr), print("a bar", file=sys.stderr)))
        other.start()
        other.join()
        return export(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", talkative)
    fs.ScoreDensity(InTime(nn.Linear(4, 4)).eval(), fs.VP(), "eps", program=True).estimate(torch.ones(1, 4), nfe=16)
    print("and its end", file=streams[0])  # a bar keeps the stream that it began on, and may end in any thread
    assert capsys.readouterr().err == "a bar\nand its end\n"
