"""docs/tutorial.md runs as it stands, prints what stands there, and what it says of these numbers is so."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parent.parent / "docs" / "tutorial.md").read_text()
STEPS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)
NUMBER = r"-?\d+\.?\d*(?:e[-+]\d+)?"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return what the page defines in the end, and of every block that prints what it printed and what stands there."""
    names, told = {}, []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        for code, stated in STEPS:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(code, names)
            told.append((printed.getvalue(), stated))
    torch.set_num_threads(threads)
    return names, [pair for pair in told if any(pair)]


def test_it_prints_what_stands_there(run):
    for printed, stated in run[1]:
        assert re.sub(NUMBER, "", printed) == re.sub(NUMBER, "", stated)
        found, expected = ([float(v) for v in re.findall(NUMBER, text)] for text in (printed, stated))
        # Another processor rounds otherwise, and 2,000 steps of training make of it other weights: means move by
        # tenths of a nat, errors and single samples by more. Truncation is an estimate of what lies where nothing is.
        assert found == pytest.approx(expected, rel=0.3, abs=0.3)


def test_what_it_says_of_the_numbers(run):
    names, told = run
    truth = float(names["truth"].log_prob(names["test_data"]).mean())
    line = r"(\w+) (-?\d+\.\d+) \+- \S+ nats(?:, stderr (\S+))?"
    found = [
        (name, float(mean), float(error or "nan")) for text, _ in told for name, mean, error in re.findall(line, text)
    ]
    assert [name for name, *_ in found] == [*["log_prob"] * 6, "difference"]
    (bound, error), (fitted, less), (_, asked), (ode, _), (trained, _), (after, _), (gain, of_gain) = (
        rest for _, *rest in found
    )
    assert fitted == pytest.approx(bound, abs=0.3)  # 500 samples of 1.6 nats: four standard errors
    assert less < error / 7  # "a tenth"
    assert less < asked < 0.3  # with fewer evaluations
    assert -3 < bound - truth < -2  # "two and a half nats"
    assert fitted < ode < truth
    assert fitted + 1 < trained < truth
    assert ode < after < ode + gain / 2  # "has risen by less"
    assert gain == pytest.approx(trained - fitted, abs=0.1)  # 500 samples of 0.39 nats: five standard errors
    assert of_gain < error  # of the network before, evaluated as often without a fit, alone
    assert float(names["result"].mean()[0]) == pytest.approx(trained, abs=6e-3)  # printed with two decimals
    assert 0.3 < float((names["noisy"] < names["normal"].quantile(0.01)).float().mean()) < 0.7
