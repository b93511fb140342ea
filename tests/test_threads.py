"""Threads that use the package at once; torch.export, which traces networks, is not made for them."""

import threading

import torch
from torch import nn

import fastscore as fs
from fastscore.program import Programs


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
            density = fs.ScoreDensity(InTime(net), fs.VP(), program=True)
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
