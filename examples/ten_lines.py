"""The README's ten lines, with a network whose density is known: a mixture of two Gaussians in four dimensions."""

import torch
from torch import nn

import fastscore as fs

MEANS = torch.tensor([[1.0, 0.0, -1.0, 0.5], [-1.0, 1.0, 0.0, -0.5]])
STDS = torch.tensor([0.4, 0.7])


class MixtureNetwork(nn.Module):
    """The exact answer of a network of noise, E[eps | x_t], which training would come near to."""

    def __init__(self, schedule: fs.DDPM) -> None:
        super().__init__()
        self.schedule, self.gain = schedule, nn.Parameter(torch.ones(()))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (value.to(x_t)[:, None] for value in self.schedule.alpha_sigma(t))
        variance = alpha**2 * STDS.to(x_t) ** 2 + sigma**2  # of x_t under each Gaussian, (rows, 2)
        away = x_t[:, None] - alpha[:, None] * MEANS.to(x_t)
        logits = -0.5 * away.square().sum(-1) / variance - 0.5 * x_t.shape[1] * variance.log()
        eps = sigma[:, None] * away / variance[..., None]
        return self.gain * (logits.softmax(1)[..., None] * eps).sum(1)


def samples(count: int, seed: int) -> torch.Tensor:
    """Return samples of the mixture, (count, 4)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(2, (count,), generator=generator)
    return MEANS[which] + STDS[which, None] * torch.randn(count, 4, generator=generator)


def exact_log_prob(x: torch.Tensor) -> torch.Tensor:
    """Return the log-density of the mixture, nats, (B,)."""
    each = torch.distributions.Normal(MEANS, STDS[:, None]).log_prob(x[:, None]).sum(-1)
    return each.logsumexp(1) - torch.tensor(2.0).log()


model = MixtureNetwork(fs.DDPM.linear(1000))
train_data, test_data, x, step = samples(300, seed=1), samples(50, seed=2), samples(8, seed=3), 0

# x, train_data, test_data: float tensors (N, *shape), scaled as in training
density = fs.ScoreDensity(model, fs.DDPM.linear(1000), predicts="eps")  # model(x_t, t)
density.fit(train_data)  # optional, for smaller errors; minutes for a U-Net on a CPU
result = density.estimate(test_data, nfe=256, seed=0)
print(result.log_prob[:3], result.stderr[:3])  # nats; 1.96 stderr covers 95 %
print(result)
density.log_prob(x.requires_grad_()).sum().backward()  # x.grad, or of what made x
loss = fs.density_loss(density, x, seed=step)  # unbiased estimate of -log p(x), nats
loss.backward()

print(exact_log_prob(test_data)[:3])
