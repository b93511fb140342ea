"""A U-Net of diffusers in channels_last memory, and under autocast in bfloat16, gives the number of the plain call."""

import copy

import pytest
import torch
from torch import nn

import fastscore as fs
from fastscore.adapters import from_diffusers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")

LAST = torch.channels_last
X = 0.5 * torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(8, 16), attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ).eval()  # fmt: skip


def density(net):
    return from_diffusers(net, diffusers.DDPMScheduler(), program=False)


def of_a_data_set(made, x, control, folder):
    return fs.evaluate_dataset(made, x, folder / "out.npz", nfe=64, control=control, batch=3, progress=False)


@pytest.mark.parametrize("control", ["reference", "self"])
def test_channels_last_changes_nothing_but_roundings(control, tmp_path):
    plain, last = unet(), unet().to(memory_format=LAST)
    x = X.to(memory_format=LAST)
    expected = density(plain).estimate(X, nfe=64, control=control)
    for found in (
        density(last).estimate(x, nfe=64, control=control),
        of_a_data_set(density(last), x, control, tmp_path),
    ):
        # Convolutions of float32 in another order; norms of 192 numbers and 64 draws of them average the roundings.
        assert torch.allclose(found.log_prob, expected.log_prob, rtol=1e-6)
        assert torch.allclose(found.stderr, expected.stderr, rtol=1e-4)
    assert last.conv_in.weight.is_contiguous(memory_format=LAST)
    assert x.is_contiguous(memory_format=LAST)


def test_all_convolutions_but_the_first_see_what_they_see_elsewhere():
    """Rows of x_t are made with the channels first, and `conv_in` turns them: three channels, once a call."""
    last, seen = unet().to(memory_format=LAST), []

    def look(name):
        return lambda layer, given, found: seen.append(
            (name, *(v.is_contiguous(memory_format=LAST) for v in (*given, found)))
        )

    for name, layer in last.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(look(name))
    with torch.no_grad():
        last(X.repeat(20, 1, 1, 1).to(memory_format=LAST), 500)
    # diffusers turns batches of 64 rows and more around an upsampling by itself.
    elsewhere, all_of_them = {name for name, given, _ in seen if not given}, {name for name, *_ in seen}
    assert elsewhere == {"up_blocks.0.upsamplers.0.conv"}
    assert len(all_of_them) > 10
    seen.clear()
    density(last).estimate(X.to(memory_format=LAST), nfe=64)
    assert {name for name, *_ in seen} == all_of_them
    assert {name for name, given, _ in seen if not given} == elsewhere | {"conv_in"}
    assert all(found for *_, found in seen)


@pytest.mark.parametrize("control", ["reference", "self"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_autocast_moves_numbers_by_its_roundings(layout, control, tmp_path):
    net = unet()
    expected = density(copy.deepcopy(net)).estimate(X, nfe=64, control=control)
    net, x = net.to(memory_format=layout), X.to(memory_format=layout)
    with torch.no_grad():
        answers = net(x, 500).sample
        with torch.autocast("cpu", torch.bfloat16):
            rounded = net(x, 500).sample
    assert rounded.dtype == torch.bfloat16
    # Some twenty layers round by 2^-9 each: 1 % of an answer's norm of 5, beside residuals of norm 14. Their random
    # direction takes what is left far below the draws' own noise, which both calls have in common.
    off = (rounded.float() - answers).flatten(1).norm(dim=1) / answers.flatten(1).norm(dim=1)
    assert 1e-3 < float(off.max()) < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        of_estimate = density(net).estimate(x, nfe=64, control=control)
        of_set = of_a_data_set(density(net), x, control, tmp_path)
    for found in (of_estimate, of_set):
        assert found.control == control
        assert found.log_prob.dtype == torch.float32  # sums are no network's
        assert not torch.equal(found.log_prob, expected.log_prob)
        assert bool(((found.log_prob - expected.log_prob).abs() < 0.05 * expected.stderr).all())
        assert torch.allclose(found.stderr, expected.stderr, rtol=0.01)
    again = density(net).estimate(x, nfe=64, control=control)  # outside, nothing of it is left
    assert torch.allclose(again.log_prob, expected.log_prob, rtol=1e-6)
