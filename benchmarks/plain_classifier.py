r"""A diffusion classifier as its paper describes it, in plain PyTorch around a network and scheduler of diffusers.

.. math:: \hat y = \operatorname{argmin}_c \frac1n \sum_{i=1}^n \|\epsilon_i - \hat\epsilon(x_{t_i}, t_i, c)\|^2

with t uniform over the timesteps, eps normal, and the same (t, eps) for all classes of an image.

References:
    Your Diffusion Model is Secretly a Zero-Shot Classifier (Li et al., 2023), https://arxiv.org/abs/2303.16203
"""

import torch

ROWS = 320  # a call of the U-Net: fewer take longer a row, more hardly less (8 x 8, one thread)


@torch.no_grad()
def squared_errors(unet, scheduler, x, labels, draws, generator):
    """Return |eps - eps_hat|^2 of every image, candidate class and draw, shape (B, C, draws).

    Arguments:
        x: images, shape (B, *shape).
        labels: the candidate classes of every image, int64, shape (B, C).
        draws: how many (t, eps) an image.
    """
    classes, found = labels.shape[1], []
    some = max(1, ROWS // (classes * draws))
    for image, label in zip(x.split(some), labels.split(some)):
        t = torch.randint(len(scheduler.alphas_cumprod), (len(image), draws), generator=generator)
        eps = torch.randn(len(image), draws, *x.shape[1:], generator=generator)
        clean = image[:, None].expand_as(eps)
        x_t = scheduler.add_noise(clean.flatten(0, 1), eps.flatten(0, 1), t.flatten()).view_as(eps)
        rows = x_t[:, None].expand(-1, classes, *x_t.shape[1:]).flatten(0, 2)
        times = t[:, None].expand(-1, classes, -1).flatten()
        eps_hat = unet(rows, times, class_labels=label[..., None].expand(-1, -1, draws).flatten()).sample
        difference = eps_hat.view(len(image), classes, draws, -1) - eps.flatten(2)[:, None]
        found.append(difference.square().sum(3))
    return torch.cat(found)


def classify(unet, scheduler, x, classes, draws, seed):
    """Return the errors of all classes, (B, C, draws)."""
    labels = torch.arange(classes).expand(len(x), -1)
    return squared_errors(unet, scheduler, x, labels, draws, torch.Generator().manual_seed(seed))


def classify_in_stages(unet, scheduler, x, classes, draws, seed, first=8, keep=5):
    """Return the predictions of the paper's staged version: after `first` draws only the best `keep` classes go on."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).expand(len(x), -1)
    early = squared_errors(unet, scheduler, x, labels, first, generator)
    kept = early.mean(2).topk(keep, largest=False).indices
    late = squared_errors(unet, scheduler, x, kept, draws - first, generator)
    errors = torch.cat([early.gather(1, kept[..., None].expand(-1, -1, first)), late], 2)
    return kept.gather(1, errors.mean(2).argmin(1, keepdim=True))[:, 0]
