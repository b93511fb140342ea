"""The command `fastscore`: evaluate a data set, show what is installed, run the demonstration."""

from __future__ import annotations

import inspect
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

from ..density import ScoreDensity
from ..estimator.control import CONTROLS
from ..estimator.estimate import Estimate
from ..estimator.methods import METHODS
from ..ops import measured
from ..ops.select import BACKENDS, native
from ..process.predictions import PREDICTIONS, check_prediction
from ..runs.evaluate import Interrupted, evaluate_dataset
from ..runs.ranks import OtherRankFailed, Ranks
from .arrays import load_array, load_conditions
from .keywords import check_conditions
from .loading import load_density
from .schedules import SCHEDULES
from .words import raised_as

EXTRAS = ("torchdiffeq", "scikit-learn", "matplotlib", "safetensors", "torchmetrics", "lightning")
DEMO_NEEDS = {"scikit-learn": "sklearn", "matplotlib": "matplotlib"}
_NOTHING_COMPUTED = "interrupted before anything was computed"
SCHEDULE_HELP = f"Forward process: {', '.join(SCHEDULES)}, with numbers as in vp:0.1,20; or a file of alphas_cumprod."


METHOD_HELP = (
    "density: the integral over noise levels; discrete: Li and Yan's sum over the timesteps of a table, which has "
    "nothing to do with discrete data; elbo: the bound that DDPM sums over the same timesteps."
)


class _Prediction(click.Choice):
    """A choice that knows other libraries' words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return check_prediction(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="fastscore")
def main() -> None:
    """The log-density of diffusion and score models, with error bars."""
    click.get_current_context().with_resource(_warnings_in_a_line())


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print a warning of which the command itself is the caller without the place, which is in click's files."""
    usual = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        ours = filename.startswith(str(Path(click.__file__).parent))
        return f"fastscore: warning: {message}\n" if ours else usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


@main.command(
    epilog="For example: fastscore evaluate net.pt2 test.npy --schedule ddpm-linear --predicts eps "
    "--fit train.npy --out density.npz"
)
@click.argument("model")
@click.argument("data")
@click.option("--out", required=True, metavar="FILE", help="Result, .npz or .csv.")
@click.option("--schedule", metavar="NAME", help=SCHEDULE_HELP)
@click.option(
    "--predicts", type=_Prediction(list(PREDICTIONS)), help="What the network returns; needed where MODEL is one."
)
@click.option("--nfe", type=click.IntRange(min=1), help="Network evaluations per sample.  [default: 256]")
@click.option("--target-stderr", type=float, metavar="NATS", help="Go on until every standard error is below.")
@click.option("--max-nfe", type=click.IntRange(min=1), default=16384, show_default=True, help="Bound of that.")
@click.option("--fit", metavar="FILE", help="Training data; fitting to some thousand samples makes errors smaller.")
@click.option("--fit-evaluations", type=click.IntRange(min=1), help="Bound of the evaluations of the network for it.")
@click.option("--cond", multiple=True, metavar="NAME=FILE", help="Condition: an entry a sample, or a number.")
@click.option("--shared", multiple=True, metavar="NAME=FILE", help="Condition that all samples share.")
@click.option("--mask", metavar="FILE", help="1 where an entry counts: of shape (N, ...), or one for all samples.")
@click.option("--fit-cond", multiple=True, metavar="NAME=FILE", help="Condition of the training data.")
@click.option("--fit-mask", metavar="FILE", help="Mask of the training data.")
@click.option("--seed", type=int, default=0, show_default=True, help="Key of the noise.")
@click.option("--method", type=click.Choice(list(METHODS)), default="density", show_default=True, help=METHOD_HELP)
@click.option("--control", type=click.Choice(CONTROLS), default="auto", show_default=True, help="What is subtracted.")
@click.option("--memory", metavar="BYTES", help="Budget for tensors, such as 512MB.")
@click.option("--batch", type=click.IntRange(min=1), default=256, show_default=True, help="Samples in a saved block.")
@click.option("--bins", type=click.IntRange(min=2), help="Levels of the data, for bits per dimension.")
@click.option("--low", type=float, default=-1.0, show_default=True, help="Lower end of the data, for --bins.")
@click.option("--high", type=float, default=1.0, show_default=True, help="Upper end of the data, for --bins.")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option("--restart", is_flag=True, help="Discard an unfinished run and replace a finished result.")
def evaluate(
    model: str,
    data: str,
    schedule: str | None,
    predicts: str | None,
    fit: str | None,
    device: str,
    cond: tuple[str, ...],
    shared: tuple[str, ...],
    fit_cond: tuple[str, ...],
    mask: str | None,
    fit_mask: str | None,
    **options: Any,
) -> None:
    """Write the log-density of every sample of DATA under MODEL to a file.

    MODEL is a .pt2 file of torch.export, or package.module:factory, a function without arguments that returns a
    network, a density, or what fastscore.from_model opens, such as a pipeline of diffusers. DATA is a .npy, .npz, .pt
    or .safetensors file of shape (N, *shape); FILE:key chooses one of several arrays. Conditions are files of these
    kinds too, such as --cond y=labels.npy or --cond y=data.npz:labels, with one entry a sample of the data; a.b is the
    entry b of the network's argument a. An interrupted run goes on where it stopped when the same command runs again.

    Several processes share the work under torchrun: torchrun --nproc-per-node 4 -m fastscore evaluate ...
    """
    start, rank = time.perf_counter(), int(os.environ.get("RANK", 0))
    try:
        with Ranks.of_environment() as ranks:
            density, identity = load_density(model, schedule, predicts, _device(device, ranks.local))
            files = {"data": data, "fit": fit, "mask": mask, "fit_mask": fit_mask}
            arrays = {name: None if file is None else load_array(file) for name, file in files.items()}
            arrays["cond"] = load_conditions(cond, shared)
            arrays["fit_cond"] = load_conditions(fit_cond, () if fit is None else shared)
            check_conditions(model, density.core.model, arrays["cond"], "--cond")
            if fit is not None:
                check_conditions(model, density.core.model, arrays["fit_cond"], "--fit-cond")
                _say_what_a_fit_takes(options["fit_evaluations"], rank)
            elif fit_cond:
                raise ValueError(f"--fit-cond {fit_cond[0]} is of training data, which --fit FILE gives; add it")
            result = evaluate_dataset(density, **arrays, identity=identity, ranks=ranks, **options)
    except (KeyboardInterrupt, OtherRankFailed) as stop:
        saved = str(stop) if isinstance(stop, Interrupted | OtherRankFailed) else _NOTHING_COMPUTED
        if rank <= 1:  # rank 0 speaks for all, and rank 1 in case that it is rank 0 who is gone
            click.echo(saved, err=True)
        sys.exit(130 if isinstance(stop, KeyboardInterrupt) else 1)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        alone = fit is not None and cond and not fit_cond and str(error).startswith("the network does not take data")
        remedy = "; --cond is of DATA alone, and the training data have --fit-cond" if alone else ""
        raise click.ClickException(f"{error}{remedy}") from error
    except click.ClickException:
        raise
    except Exception as error:  # of a network's code, mostly
        raise click.ClickException(f"the evaluation stopped at {raised_as(error)}") from error
    if result is not None:
        for line in _summary(result, time.perf_counter() - start, options):
            click.echo(line)


@main.command()
def info() -> None:
    """Show versions, devices, the native module, each backend and the optional packages."""
    for title, lines in _SECTIONS.items():
        click.echo(title)
        try:
            for name, text in lines():
                click.echo(f"  {name:<14} {text}")
        except Exception as error:  # a diagnosis has to survive what it diagnoses
            click.echo(f"  cannot be found out: {type(error).__name__}: {error}")


@main.command()
@click.option("--out", default="demo", show_default=True, metavar="DIR", help="Folder for the picture and numbers.")
@click.option("--seed", type=int, default=0, show_default=True)
def demo(out: str, seed: int) -> None:
    """Train two small networks, evaluate their densities in three ways and draw them; takes about a minute."""
    missing = [package for package, module in DEMO_NEEDS.items() if find_spec(module) is None]
    if missing:
        raise click.ClickException(f"the demo needs {' and '.join(missing)}; pip install {' '.join(missing)}")
    from ..demo import run_demo

    try:
        run_demo(out, seed=seed)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _say_what_a_fit_takes(evaluations: int | None, rank: int) -> None:
    """Tell on stderr that a fit comes first, which takes minutes where nothing is seen of it."""
    most = evaluations or inspect.signature(ScoreDensity.fit).parameters["evaluations"].default
    if rank == 0:
        click.echo(
            f"fitting first, unless that was done: at most {most:,} evaluations of the network, which "
            "--fit-evaluations bounds",
            err=True,
        )


def _device(name: str, local_rank: int = 0) -> torch.device:
    if name == "auto":
        many = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank % many) if many else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}; use cpu, cuda or auto") from None
    return device


def _summary(result: Estimate, seconds: float, options: dict) -> Iterator[str]:
    mean, error = result.mean()
    yield f"samples         {len(result.log_prob)}"
    yield f"dims            {result.dims_in_words}"
    yield f"log_prob        {mean:.6g} +- {error:.2g} nats"
    if options["bins"] is not None:
        bits = result.bits_per_dim(options["bins"], options["low"], options["high"])
        jump = result.jump / result.dims / math.log(2)
        mean, error = replace(result, log_prob=bits.double(), jump=jump).mean()
        yield f"bits/dim        {mean:.6g} +- {error:.2g}"
    yield f"stderr          {float(result.stderr.double().mean()):.3g} nats, mean over samples"
    yield f"evaluations     {float(result.nfe.double().mean()):.6g} per sample"
    yield f"seconds         {seconds:.1f}"
    yield f"truncation      {result.truncation:.2g} nats, an estimate, the largest of a sample"
    label = "{:.2g} nats, an estimate" if result.method == "density" else "{:+.2g} nats from the integral"
    yield f"discretization  {label.format(result.discretization)}"
    yield f"written to      {options['out']}"


Lines = Iterator[tuple[str, str]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Lines:
    yield "fastscore", _version("fastscore") or "not installed, imported from a folder"
    yield "python", platform.python_version()
    yield "torch", torch.__version__
    yield "triton", _version("triton") or "not installed"
    yield "numpy", _version("numpy") or "not installed"
    yield "CUDA toolkit", torch.version.cuda or "none: this torch is built without CUDA"


def _devices() -> Lines:
    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            yield "cuda", f"none: {str(error).splitlines()[0]}"
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{device.name}, {device.total_memory >> 20} MiB, sm_{device.major}{device.minor}"


def _native() -> Lines:
    module = native()
    if isinstance(module, str):
        yield "fastscore._C", module
        return
    yield "fastscore._C", "present"
    yield from module.build_info().items()
    yield from module.runtime().items()


def _backends() -> Lines:
    for kind in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        for backend in BACKENDS:
            yield f"{backend.name} on {kind}", backend.why_not(torch.device(kind), torch.float32) or "can run"


def _measured() -> Lines:
    for row in measured.ROWS:
        yield f"{row.kind} {row.width}", f"{row.work}: {row}"
    yield "otherwise", "the nearest of these; on other compute capabilities Triton's kernels; without any of them torch"


def _extras() -> Lines:
    for package in EXTRAS:
        yield package, _version(package) or f"not installed; pip install {package}"


_SECTIONS: dict[str, Callable[[], Lines]] = {
    "versions": _versions,
    "devices": _devices,
    "native module": _native,
    "backends (float32)": _backends,
    f'order where backend="auto" may choose, by {measured.SOURCE}': _measured,
    "optional packages": _extras,
}
