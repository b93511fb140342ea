"""The recipe of docs/images.md runs as it stands, and its bits are those of pixels that are known."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastscore as fs

PAGE = (Path(__file__).parents[1] / "docs" / "images.md").read_text()
LOW, HIGH = 64, 192  # every pixel is uniform on these levels: seven bits


class Uniform(nn.Module):
    """The exact noise prediction of pixels that are uniform on an interval."""

    def __init__(self, schedule: fs.Schedule, low: float, high: float) -> None:
        super().__init__()
        self.schedule, self.low, self.high = schedule, low, high

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (v[:, None, None, None] for v in self.schedule.alpha_sigma(t))
        mean, std, normal = x_t / alpha, sigma / alpha, torch.distributions.Normal(0.0, 1.0)
        a, b = ((end - mean) / std for end in (self.low, self.high))
        mass = (normal.cdf(b) - normal.cdf(a)).clamp(min=1e-300)
        inside = mean + std * (normal.log_prob(a).exp() - normal.log_prob(b).exp()) / mass
        x0 = inside.clamp(self.low, self.high)
        return ((x_t - alpha * x0) / sigma).to(x_t.dtype)


def count_rows(net: nn.Module) -> list[int]:
    """Return a list to which every call of the network adds its rows."""
    rows = []
    net.register_forward_hook(lambda module, given, found: rows.append(len(found)))
    return rows


@pytest.mark.parametrize(
    ("schedule", "bits", "of_levels"),
    [pytest.param(fs.VP(), 7.0, 7.93, marks=pytest.mark.long), (fs.DDPM.linear(1000), 7.02, 7.02)],
    ids=["VP", "DDPM"],
)
def test_the_bits_of_pixels_with_seven(schedule, bits, of_levels, capsys):
    generator, levels = torch.Generator().manual_seed(0), fs.Levels(256)
    k = torch.randint(LOW, HIGH, (700, 3, 8, 8), generator=generator)
    ends = (float(levels.values(torch.tensor(end)) - levels.width / 2) for end in (LOW, HIGH))
    names = {"fs": fs, "schedule": schedule, "unet": Uniform(schedule, *ends)}
    names |= {"train_levels": k[:-16], "test_levels": k[-16:]}
    rows = count_rows(names["unet"])
    recipe, discrete = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[:2]
    exec(recipe, names)
    # The page's 31,000 of the fit, a few for checks and traces, and the estimate's own.
    assert 31_000 * 0.95 < sum(rows) - 16 * 256 < 31_000 * 1.05
    found, error = names["result"].mean_bits_per_dim(levels)
    assert found == pytest.approx(bits, abs=0.01)  # as the page says it, with an error of the mean of 0.003
    # The truth is within what the truncation says, in nats, and the noise.
    beyond = float(names["result"].truncation_per_sample.mean()) / 192 / math.log(2)
    assert abs(found - 7) < 4 * error + beyond
    exec(discrete, names)
    assert float(names["discrete"].bits_per_dim().mean()) == pytest.approx(of_levels, abs=0.02)
    assert "largest truncation about" in capsys.readouterr().out
