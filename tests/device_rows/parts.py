"""Rows of schedules, references and training."""

import torch

import fastscore as fs
from fastscore.process import predictions
from fastscore.training import losses

from .common import LABELS, NFE, REFERENCES, SCHEDULES, D, Net, X, of, random, row, summary


@row("Schedule", "Schedule.log_snr", "Schedule.time", "Schedule.scale", "Schedule.alpha_sigma", "Schedule.derivatives",
     "Schedule.log_snr_range", "Schedule.range_for", "DDPM.entries", "DDPM.time_range", "EDM.time_range",
     "LogSNR.time_range",
     each=[f"schedule {name}" for name in SCHEDULES])  # fmt: skip
def schedule(on, name):
    process = SCHEDULES[name.removeprefix("schedule ")]()
    log_snr = on(torch.linspace(*process.log_snr_range, 7, dtype=torch.float64)[1:-1])
    t = process.time(log_snr)
    slopes = () if process.discrete else process.derivatives(t)
    return (
        t,
        process.log_snr(t),
        process.alpha_sigma(t),
        process.scale(log_snr),
        slopes,
        process.log_snr_range,
        process.range_for(0.1, 2.0),
    )


@row("Reference.from_tensors", "Reference.isotropic", "Reference.components", "Reference.full", "Reference.tensors",
     "Reference.flops", "Reference.log_prob", "Reference.residual", "Reference.eps", "Reference.eps_and_divergence",
     "Reference.diffused", "Reference.gaussian", "Reference.expected_residual", "Reference.expected_integral",
     "Reference.on", "Reference.host", "Reference.scales", "Reference.scaled", "Reference.along_axes",
     "Reference.alike",
     "Reference.factors", "Reference.turn", "Reference.turned", "Reference.component",
     each=[f"alone {kind}" for kind in REFERENCES])  # fmt: skip
def reference(on, name):
    kept = REFERENCES[name.removeprefix("alone ")]()
    q, x, eps = kept.on(on(X).device), on(X), on(random(6, 4, D))
    sigma = on(torch.linspace(0.1, 0.9, 4, dtype=torch.float64))
    alpha = (1 - sigma**2).sqrt()
    x_t = alpha[:, None] * x[:, None] + sigma[:, None] * eps
    single, weight = q.gaussian(), on(torch.ones(4, dtype=torch.float64))
    return [
        q.log_prob(x), q.residual(x, x_t.float(), eps, alpha, sigma), q.eps(x_t.float(), alpha, sigma),
        q.eps_and_divergence(x, 0.8, 0.6), q.diffused(0.1).log_prob(x), single.tensors(), q.components, q.full,
        q.flops(D), single.expected_residual(x, on(sigma), weight), single.expected_integral(x, -3, 3),
        fs.Reference.from_tensors(q.tensors()).log_prob(x), q.host("mean").numpy().sum(), q.scales(),
        q.scaled(2.0).log_prob(x), q.turn(x), q.turned, q.along_axes, q.alike, q.factors, q.component(0, x),
    ]  # fmt: skip


@row("density_loss", "AdaptiveNodes", "AdaptiveNodes.density", "AdaptiveNodes.observe", "AdaptiveNodes.on",
     "AdaptiveNodes.host", "AdaptiveNodes.cover", each=[f"reduction {r}" for r in losses.REDUCTIONS])  # fmt: skip
def training(on, name):
    made, adaptive = of(on), on(fs.AdaptiveNodes(fs.VP()))
    optimizer, found = torch.optim.AdamW(made.model.parameters(), 1e-2), []
    for step in range(3):
        loss = fs.density_loss(
            made, on(X), seed=step, draws=2, antithetic=step > 0, nodes=adaptive,
            reduction=name.removeprefix("reduction "), label=on(LABELS),
        )  # fmt: skip
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        found.append(loss)
    adaptive.cover(-5.0, 6.0)
    return found, adaptive.state_dict(), dict(made.model.named_parameters()), adaptive.host("edges").numpy().sum()


@row("density_loss", "AdaptiveNodes")
def training_with_nodes_on_the_host(on):
    adaptive = fs.AdaptiveNodes(fs.VP())
    loss = fs.density_loss(of(on), on(X), seed=0, nodes=adaptive)
    return loss, adaptive.density.share.numpy().sum()


@row("DiffusionLoss", "DiffusionLoss.forward", "DiffusionLoss.log_prob", "DiffusionLoss.estimate")
def diffusion_loss(on):
    class Head(Net):
        def forward(self, x_t, t, c):
            return super().forward(x_t + c, t)

    loss = fs.DiffusionLoss(on(Head()), predicts="eps")
    x, z = on(random(2, 4, D)), on(random(2, 4, D, seed=1)).requires_grad_()
    value = loss(x, z, seed=0, mask=on(torch.arange(8).reshape(2, 4) % 2 == 0))
    value.backward()
    return value, z.grad, loss.log_prob(x, z, nfe=NFE), summary(loss.estimate(x, z, nfe=NFE))


@row("score_regularization")
def regularization(on):
    x = on(X.clone()).requires_grad_()
    value = fs.score_regularization(of(on), x, seed=0, draws=2)
    value.backward()
    return value, x.grad


@row("density_weights", "elbo_weights", each=[f"weights {p}" for p in predictions.PREDICTIONS if p != "flow"])
def weights(on, name):
    t, predicts = on(torch.arange(100).reshape(10, 10)), name.removeprefix("weights ")
    table = fs.DDPM.linear(100)
    rules = [fs.density_weights(table, t, predicts, rule) for rule in ("discrete", "density")]
    return rules, fs.elbo_weights(table, t, predicts)
