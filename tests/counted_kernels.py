"""Triton's kernels on the pretended device: each counts as one launch and computes nothing, so that launches can be
counted as a GPU would see them, with all that surrounds the kernels."""

import pytest
import torch
from fastscore.kernels import (
    control,
    density_mlp,
    density_mlp_dp,
    density_mlp_dx,
    density_mlp_wide,
    launch,
    occupancy,
    perturb,
    residual,
    summary,
    words,
)  # fmt: skip

from fastscore.ops import triton as triton_backend

KERNELS = {
    control: ["control_fwd_kernel", "diagonal_fwd_kernel"],
    density_mlp: ["density_mlp_fwd_kernel"],
    density_mlp_dp: ["density_mlp_grad_kernel"],
    density_mlp_dx: ["density_mlp_grad_kernel"],
    density_mlp_wide: ["density_mlp_wide_kernel"],
    perturb: ["perturb_fwd_kernel"],
    residual: ["residual_fwd_kernel", "residual_bwd_kernel"],
    summary: ["summary_kernel"],
    words: ["words_kernel"],
}


OPS = "perturb", "residual", "residual_backward", "control", "density_mlp", "density_mlp_dp", "density_mlp_dx"
H200 = occupancy.Multiprocessors(132, 233_472)


class Counted:
    def __init__(self, device):
        self.device = device

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options):
        self.device.counts.launches += 1


@pytest.fixture
def counted_kernels(device, monkeypatch):
    """Let the pretended device run Triton's kernels, as far as counting goes; their outputs are not written."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(launch.Device, "of", lambda device: launch.Device(90, 227 << 10))
    monkeypatch.setattr(occupancy.Multiprocessors, "of", lambda device: H200)
    for name in OPS:
        monkeypatch.setattr(triton_backend, name, device._watched_again(getattr(triton_backend, name)))
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, Counted(device))
    return device
