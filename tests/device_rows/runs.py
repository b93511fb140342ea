"""Rows of metrics, data sets and the command line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastscore as fs
from fastscore import metrics
from fastscore.cli import commands as cli
from fastscore.runs.dataset import take
from fastscore.runs.evaluate import evaluate_dataset

from . import common
from .common import LABELS, NFE, D, Net, X, mixture_data, of, row, summary
from .density import SHIFT, Shifted

METRICS = ["NegativeLogLikelihood", "BitsPerDim"]


@row("NegativeLogLikelihood.update", "NegativeLogLikelihood.forward", "NegativeLogLikelihood.compute",
     "BitsPerDim.update", "BitsPerDim.forward", "BitsPerDim.compute", each=METRICS)  # fmt: skip
def metric(on, name):
    found = []
    for place in (on, lambda v: v):  # the metric on the device, and on the host
        made = place(getattr(metrics, name)(of(on), nfe=NFE))
        made.update(on(X))
        found.append({k: v.cpu() for k, v in (made.compute() | made(on(X))).items()})
        made.reset()
        made.update(on(X), sample_index=torch.arange(6), label=on(LABELS))
        made.update(on(X), sample_index=torch.arange(6, 12), label=on(LABELS))
        found.append({k: v.cpu() for k, v in made.compute().items()})
    return found


@row("LogDensity", "LogDensity.name", "LogDensity.on_validation_epoch_start", "LogDensity.on_validation_batch_end",
     "LogDensity.on_validation_epoch_end")  # fmt: skip
def callback(on):
    pytest.importorskip("lightning")
    from fastscore.lightning import LogDensity

    logged, made = {}, of(on)
    log = LogDensity(metrics.BitsPerDim(made, nfe=NFE))
    trainer = SimpleNamespace(state=SimpleNamespace(fn="validate"), callbacks=[log], num_val_batches=[1])
    module = SimpleNamespace(device=on(X).device, log_dict=lambda values, prog_bar: logged.update(values))
    log.on_validation_epoch_start(trainer, module)
    log.on_validation_batch_end(trainer, module, None, (on(X), None), 0)
    log.on_validation_epoch_end(trainer, module)
    return logged


@row("evaluate_dataset", each=["data there", "data on the host"])
def data_set(on, name, folder):
    data = on(X) if name == "data there" else X.numpy()
    fitted = on(mixture_data(40)) if name == "data there" else mixture_data(40)
    options = {"nfe": NFE, "batch": 4, "fit": fitted, "restart": True}
    found = evaluate_dataset(of(on), data, folder / "found.npz", **options)
    return summary(found), take(X, torch.arange(2))


@row("evaluate_dataset", each=["masks there", "masks on the host"])
def data_set_under_masks(on, name, folder):
    data, fitted = X, mixture_data(40)
    mask, fit_mask = (torch.arange(v.numel()).reshape(v.shape) % 4 > 0 for v in (data, fitted))
    arrays = [on(v) if name == "masks there" else v.numpy() for v in (data, mask, fit_mask)]
    options = {"mask": arrays[1], "fit_mask": arrays[2], "fit": on(fitted) if name == "masks there" else fitted}
    found = evaluate_dataset(of(on), arrays[0], folder / "found.npz", nfe=NFE, batch=4, restart=True, **options)
    return summary(found)


@row("evaluate_dataset")
def data_set_under_conditions(on, folder):
    labels, shift = torch.arange(40) % 4, fs.shared(SHIFT)
    given = {"cond": {"given": {"label": LABELS.numpy(), "shift": shift}}}
    given["fit_cond"] = {"given": {"label": labels, "shift": shift}}
    made = fs.ScoreDensity(on(Shifted()), fs.VP(), "eps", program=False)
    found = evaluate_dataset(
        made, X, folder / "found.npz", fit=mixture_data(40), nfe=NFE, batch=4, restart=True, **given
    )
    return summary(found)


@row("evaluate", each=["a factory", "an exported program"])
def command_line(on, name, folder):
    data, fitted, out = folder / "x.npy", folder / "fit.npy", folder / "found.npz"
    np.save(data, X.numpy())
    np.save(fitted, mixture_data(40).numpy())
    model = f"{common.__name__}:network"
    if name == "an exported program":
        rows = torch.export.Dim("rows")
        example = torch.randn(2, D), torch.rand(2)
        shapes = {"x_t": {0: rows}, "t": {0: rows}}
        torch.export.save(torch.export.export(Net(), example, dynamic_shapes=shapes), folder / "net.pt2")
        model = str(folder / "net.pt2")
    words = f"evaluate {model} {data} --out {out} --fit {fitted} --schedule vp --predicts eps --nfe {NFE} --batch 4"
    words = [*words.split(), "--device", on(X).device.type, "--restart"]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, (done.output, done.exception)
    with np.load(out) as found:
        return {key: torch.from_numpy(found[key]) for key in found.files}
