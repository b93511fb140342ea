"""The demonstration: train two small networks, evaluate their densities three ways, and draw what was found."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..density import ScoreDensity
from .comparison import Row, compare_methods
from .picture import draw
from .problems import Problem, digits, two_moons
from .training import train

NFE = 256


def run_demo(out: str, seed: int = 0) -> None:
    """Run both problems, print a table for each, and write `demo.png` and `demo.json` into the folder `out`.

    Raises:
        ValueError: if `out` is a file.
    """
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, got the file {out!r}; give another name")
    folder.mkdir(parents=True, exist_ok=True)
    found = {problem.name: _solve(problem, seed) for problem in (two_moons(seed), digits(seed))}
    numbers = {name: [row._asdict() for row in rows] for name, (_, _, rows) in found.items()}
    (folder / "demo.json").write_text(json.dumps(numbers, indent=2) + "\n")
    densities = [(problem, density) for problem, density, _ in found.values()]
    draw(folder / "demo.png", *densities)
    print(f"written to {folder / 'demo.png'} and {folder / 'demo.json'}")


def _solve(problem: Problem, seed: int) -> tuple[Problem, ScoreDensity, list[Row]]:
    torch.manual_seed(seed)
    density = ScoreDensity(problem.network(), problem.schedule, problem.predicts, nfe=NFE)
    print(
        f"{problem.name}: {len(problem.train(0))} samples to train on, {len(problem.test)} held out, d = {problem.dims}"
    )
    train(density, problem.batches(seed), problem.steps)
    density.fit(problem.train(0), seed=seed)
    tqdm.write(f"  fitted a {density.reference!r}")
    rows = compare_methods(density, problem, NFE, seed)
    _print_table(problem, rows)
    return problem, density, rows


def _print_table(problem: Problem, rows: list[Row]) -> None:
    bits = problem.levels is not None
    print(
        f"  {'':<32}{'log p, nats':>18}{'bits/dim' if bits else '':>17}{'error/sample':>14}{'passes':>8}{'seconds':>9}"
    )
    for row in rows:
        mean = f"{row.log_prob:.3f} +- {row.log_prob_error:.3f}"
        per_dim = f"{row.bits_per_dim:.3f} +- {row.bits_per_dim_error:.3f}" if bits else ""
        print(f"  {row.method:<32}{mean:>18}{per_dim:>17}{row.error:>14.3f}{row.passes:>8}{row.seconds:>9.1f}")
    plain, ours = rows[1].error, rows[0].error
    print("  error/sample: spread of one sample's log p over repetitions; passes: forward or backward, a sample")
    print(f"  plain Monte Carlo needs {(plain / ours) ** 2:,.0f} times the passes for the error of fastscore")
    if problem.exact is not None:
        exact = problem.exact(problem.test)
        print(f"  exact log-density of the data: {float(exact.mean()):.3f} nats")
    print()
