"""Repeated calls on a GPU: how much they launch, that nothing crosses or waits, and that nothing stale is replayed.

The device is pretended: a captured graph runs the captured operations again on the same memory, as a CUDA graph does.
"""

import copy
import functools
import itertools
import threading

import pytest
import torch
from counted_kernels import counted_kernels  # noqa: F401
from pretended_device import CUDA, PretendedDevice
from test_plan import CHANGES, NFE, B, Net, data

import fastscore as fs
from fastscore.estimator import replay
from fastscore.ops import noise
from fastscore.reference.gaussians import Reference
from fastscore.reference.turning import cosines

pytestmark = pytest.mark.slow


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def make(schedule=None, **options):
    torch.manual_seed(0)
    return fs.ScoreDensity(Net().eval().cuda(), schedule or fs.VP(), **{"predicts": "eps"} | options)


def replays(density):
    return [found for found in density.replays._seen.values() if isinstance(found, replay.Replay)]


def values(found):
    return [v.cpu() for v in (found.log_prob, found.stderr, found.variance, found.nfe, found.truncation_per_sample)] + [
        found.log_snr_curve.log_snr, found.log_snr_curve.mean, found.log_snr_curve.stderr,
    ]  # fmt: skip


def fresh(density, x, **options):
    return values(copy.deepcopy(density).estimate(x, nfe=NFE, progress=False, **options))


def agree(density, x, **options):
    expected = fresh(density, x, **options)
    for _ in range(3):
        assert all(map(torch.equal, values(density.estimate(x, nfe=NFE, progress=False, **options)), expected))


COUNTED = {
    "VP, eps": {},
    "a table": {"schedule": lambda: fs.DDPM.linear(100)},
    "EDM, denoiser": {"schedule": lambda: fs.VE(0.01, 50.0), "predicts": "denoiser"},
    "flow": {"schedule": fs.FlowMatching, "predicts": "flow"},
    **{f"predicts {name}": {"predicts": name} for name in ("x0", "v", "score")},
    "a diagonal reference": {"reference": lambda: Reference(torch.ones(1), torch.zeros(1, 5), torch.ones(1, 5))},
    "a mixture": {"reference": lambda: Reference(torch.ones(2) / 2, torch.randn(2, 5), torch.ones(2, 5))},
    "cosines": {"reference": lambda: Reference(torch.ones(1), torch.randn(1, 5), torch.ones(1, 5), factors=turned(5))},
    "times in float64": {"time_dtype": torch.float64},
}
# Launches of a repeated call, at most: the copy of x, the graph, and four copies of what it has found. Another seed
# takes an index and two kernels for the words, the rounding of the rows' numbers, and two copies more.
REPEATED, NEW_SEED = 6, 12
# Beside a network that is no program: noise, residual, control, their difference, the summary and its sum, the times of
# all rows, and two fills. What no kernel does is more operations: a mixture's tables of rows and its log-density some
# sixty, a Gaussian in cosines some thirty.
THIN, THIN_OF = 10, {"a mixture": 70, "cosines": 42}


def turned(d):
    return [cosines(d), torch.empty(0), torch.empty(0)]


# A fit replaces the reference: of these names by one of their kind. It finds none in cosines for data without a shape.
KINDS = {"a diagonal reference": "diagonal", "a mixture": "mixture"}
# What is predicted, and the dtype of times, are no matter of what a fit replaces.
FRESH = [pytest.param(name, False, id=f"{name}-") for name in COUNTED]
REPLACED = "VP, eps", "a table", "EDM, denoiser", "flow", *KINDS
FITTED = [pytest.param(name, True, id=f"{name}-fitted") for name in REPLACED]


def options_of(name):
    """Return the schedule and the other options of a name."""
    options = dict(COUNTED[name])
    schedule = options.pop("schedule", fs.VP)()
    if "reference" in options:
        options["reference"] = options["reference"]()
    return schedule, options


@functools.cache
def fit_of(name):
    """Return the state after a fit; with half of the evaluations the noise would stay independent."""
    schedule, options = options_of(name)
    torch.manual_seed(0)
    density = fs.ScoreDensity(Net().eval(), schedule, **{"predicts": "eps"} | options)
    density.fit(data(200, seed=4), reference=KINDS.get(name, "auto"), evaluations=120_000, progress=False)
    assert density.nodes.calibration.numel()
    return density.state_dict()


@pytest.fixture
def state(name, fitted):
    """What a fit leaves, on the host and before a device is pretended, which takes twenty times as long; or nothing."""
    return fit_of(name) if fitted else None


def counted(name, state):
    schedule, options = options_of(name)
    density = make(schedule, **options)
    if state is not None:
        density.load_state_dict(state)
    return density, data(3).cuda()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fitted"), FRESH + FITTED)
def test_a_repeated_estimate_is_one_graph_without_crossings_or_waits(state, device, name, fitted):
    density, x = counted(name, state)
    for _ in range(2):
        density.estimate(x, nfe=NFE, progress=False)
    with device.counting() as counts:
        found = density.estimate(x, nfe=NFE, progress=False)
    assert (counts.crossings, counts.waits) == (0, 0)
    assert counts.launches <= REPEATED
    assert density.replays.reason is None
    assert len(replays(density)) == 1
    assert all(map(torch.equal, values(found), fresh(density, x)))


@pytest.fixture
def word_kernels(device, monkeypatch):
    """Count the words of the noise as on a GPU, where a kernel makes them: here they are Philox's hundred operations.

    Gives the calls.
    """
    calls = []
    for name in ("words", "sample_keys"):
        monkeypatch.setattr(noise, name, device.as_kernel(getattr(noise, name), calls))
    return calls


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fitted"), FRESH + FITTED)
def test_a_new_seed_takes_few_launches_more(state, device, word_kernels, name, fitted):
    density, x = counted(name, state)
    for _ in range(2):
        density.estimate(x, nfe=NFE, progress=False)
    for seed in (5, 6):
        with device.counting() as counts:
            found = density.estimate(x, nfe=NFE, seed=seed, progress=False)
        assert word_kernels
        assert (counts.to_host, counts.waits) == (0, 0)
        assert counts.to_device <= 2  # the numbers of the rows, and of the rules
        assert counts.launches <= NEW_SEED
    assert all(map(torch.equal, values(found), fresh(density, x, seed=6)))


class Images(torch.nn.Module):
    """No row program: what it makes of x and t goes through convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.last = (torch.nn.Conv2d(5, 5, 3, padding=1) for _ in range(2))

    def forward(self, x, t):
        return self.last(torch.nn.functional.silu(self.first(x) + t[:, None, None, None].to(x)))


# A first call asks a flow with a generator of the device. What a fit finds is made up here, for cosines too.
UNASKED = [case for case in FRESH + FITTED if case.values[0] != "flow"] + [pytest.param("cosines", True)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "fitted"), UNASKED)
def test_around_a_network_that_is_no_program_are_few_launches(device, counted_kernels, name, fitted):  # noqa: F811
    schedule, options = options_of(name)
    torch.manual_seed(0)
    model, x = Images().eval().cuda(), torch.randn(3, 5, 1, 1).cuda()
    density = fs.ScoreDensity(model, schedule, **{"predicts": "eps", "backend": "triton"} | options)
    if fitted:  # with numbers that no kernel has written, what fit finds would be of no use
        density.nodes.calibration = torch.tensor([[4.0, 8]] + [[0.0, 0]] * 4 + [[1.0, 1]], dtype=torch.float64)
    for _ in range(2):
        density.estimate(x, nfe=NFE, progress=False)
    rows, t = torch.zeros(3 * NFE, 5, 1, 1, device=CUDA), torch.zeros(3 * NFE, device=CUDA)
    with device.counting() as network, torch.no_grad():
        model(rows, t)
    with device.counting() as counts:
        density.estimate(x, nfe=NFE, progress=False)
    assert (counts.crossings, counts.waits) == (0, 0)
    assert counts.launches - network.launches <= THIN_OF.get(name, THIN)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [change for change in CHANGES if "numpy" not in change])
def test_nothing_stale_is_replayed_after(device, change):
    density, x = make(), data().cuda()
    for _ in range(2):
        density.estimate(x, nfe=NFE, progress=False)
    assert len(replays(density)) == 1
    CHANGES[change](density)
    agree(density, x.double() if change == "float64" else x)


def test_seeds_data_conditions_and_shapes_in_turns(device, monkeypatch):
    density = make()
    calls = [{}, {"seed": 1}, {}, {"seed": 1}, {"sample_index": torch.arange(60, 60 + B)}, {}, {"seed": 2}, {}]
    for number, options in enumerate(calls):
        agree(density, data(seed=number % 3).cuda(), **options)
    assert 1 <= len(replays(density)) <= 2  # the default indices, and the others
    monkeypatch.setattr(replay, "KEPT", 2)
    for count in (2, 3, 4):
        agree(density, data(count).cuda())
    assert len(replays(density)) == 2


class Labelled(Net):
    def forward(self, x, t, label, scale):
        return super().forward(x, t) * scale + label[:, None]


def test_conditions_are_copied_and_their_values_count(device):
    torch.manual_seed(0)
    density, x = fs.ScoreDensity(Labelled().eval().cuda(), fs.VP(), "eps"), data(6).cuda()
    for step in range(4):
        label, scale = torch.arange(6.0).cuda() + step, torch.full((), 1.0 + step).cuda()
        agree(density, x, label=fs.per_sample(label), scale=fs.shared(scale))
    assert len(replays(density)) == 1


@pytest.mark.parametrize(
    ("reason", "options", "call"),
    [
        ("the network is no row program", {"program": False}, {}),
        ("the method is 'elbo'", {}, {"method": "elbo"}),
        ("a mask is given", {}, {"mask": torch.ones(5, dtype=torch.bool)}),
        ("in several chunks", {}, {"memory": "40KB"}),
    ],
)
def test_what_is_not_replayed_says_why(device, monkeypatch, reason, options, call):
    said, why_not = [], replay.why_not
    monkeypatch.setattr(replay, "why_not", lambda *args: said.append(why_not(*args)) or said[-1])
    density, x = make(**options), data().cuda()
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    for _ in range(3):
        density.estimate(x, nfe=NFE, progress=False, **call)
    assert not replays(density)
    assert all(reason in each for each in said)
    assert reason in density.replays.reason
    monkeypatch.setenv("FASTSCORE_GRAPHS", "0")
    density = make()
    for _ in range(3):
        density.estimate(x, nfe=NFE, progress=False)
    assert said[-1] == "FASTSCORE_GRAPHS=0 is set"
    monkeypatch.delenv("FASTSCORE_GRAPHS")
    monkeypatch.setenv("FASTSCORE_CHECK", "now")
    density.estimate(x, nfe=NFE, progress=False)
    assert said[-1] == "FASTSCORE_CHECK=now is set, and looks at every chunk"
    assert not replays(density)


def test_after_a_replay_what_is_asked_for_otherwise_is_not_replayed(device, monkeypatch):
    density, x = make(), data(6).cuda()
    agree(density, x)
    assert density.replays.reason is None
    found = density.estimate(x.double(), nfe=NFE, progress=False)  # weights stay float32
    assert found.log_prob.dtype == torch.float64
    assert all(map(torch.equal, values(found), fresh(density, x.double())))
    agree(density, x)
    torch.set_autocast_enabled("cuda", True)  # a context of torch.autocast leaves it off where there is no GPU
    try:
        density.estimate(x, nfe=NFE, progress=False)
        assert "the network is no row program" in density.replays.reason
    finally:
        torch.set_autocast_enabled("cuda", False)
    agree(density, x)
    for name, value in (("FASTSCORE_GRAPHS", "0"), ("FASTSCORE_CHECK", "now")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            density.estimate(x, nfe=NFE, progress=False)
            assert density.replays.reason.startswith(f"{name}={value} is set")
        agree(density, x)


def test_a_graph_that_gives_other_numbers_is_not_used(device, monkeypatch):
    call = replay.Replay.__call__
    wrong = lambda *args: [each._replace(told=each.told + 1) if hasattr(each, "told") else each for each in call(*args)]  # noqa: E731
    monkeypatch.setattr(replay.Replay, "__call__", wrong)
    density, x = make(), data(6).cuda()
    agree(density, x)
    assert list(density.replays._seen.values()) == ["its replay gave other numbers"]


def test_a_capture_that_fails_leaves_the_call_as_it_is(device, monkeypatch):
    def refuse(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replay.Replay, "_capture", refuse)
    density, x = make(), data(6).cuda()
    agree(density, x)
    (reason,) = density.replays._seen.values()
    assert reason == "the capture failed: operation not permitted when stream is capturing"


def test_results_are_the_callers_own(device):
    density, x = make(), data(6).cuda()
    found = [density.estimate(x, nfe=NFE, seed=seed, progress=False) for seed in (0, 0, 0, 1, 0)]
    kept = values(found[2])
    found[3].log_prob.zero_()
    found[3].stderr.zero_()
    assert all(map(torch.equal, values(found[2]), kept))
    assert all(map(torch.equal, values(found[4]), kept))
    assert found[4].log_prob.device == CUDA


def test_two_threads_replay_one_graph(device):
    density, failures = make(), []
    x = [data(6, seed=seed).cuda() for seed in range(3)]
    expected = [fresh(density, each) for each in x]
    agree(density, x[0])
    lock = threading.Lock()  # a pretended device takes note of one thread's operations at a time

    def run(start):
        for i in itertools.islice(itertools.cycle(range(3)), start, start + 12):
            with lock:
                found = values(density.estimate(x[i], nfe=NFE, progress=False))
            if not all(map(torch.equal, found, expected[i])):
                failures.append(i)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_training_step_waits_for_nothing(device, monkeypatch):
    """The loss and its backward pass: beside the network some launches for noise, levels, reference and sums."""
    density, x = make(), data(6).cuda()

    def step():
        fs.density_loss(density, x, seed=1).backward()

    def plain():
        noised = x.repeat(1, 1)
        (density.model(noised, noised[:, 0]) - noised).square().sum(1).mean().backward()

    step()
    plain()
    with device.counting() as bare:
        plain()
    with device.counting() as words:
        noise.words(1, torch.arange(6, device=CUDA), 0, noise.STREAM_LOSS, 6)
    with device.counting() as counts:
        step()
    assert (counts.waits, counts.to_host) == (0, 0)
    assert counts.to_device <= 3  # indices, times, and one table of numbers
    assert counts.launches - words.launches <= bare.launches + 90


# What a captured density keeps on purpose, or what changes the data's dtype.
FIXED = (
    "another reference",
    "the reference written",
    "the nodes written",
    "other nodes",
    "a fit",
    "another noise",
    "float64",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [change for change in CHANGES if change not in FIXED])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_captured_density_follows_the_network_and_the_schedule(device, where, change):
    if where == "cuda" and "numpy" in change:
        pytest.skip("numpy writes no tensor of a GPU")
    density, x = make().to(where), data().to(where)
    captured = fs.CapturedDensity(density, x, nfe=NFE)
    captured(x)
    CHANGES[change](density)
    expected = copy.deepcopy(density).estimate(x, nfe=NFE, progress=False)
    for _ in range(2):
        found = captured(x)
        assert torch.equal(found.log_prob.cpu(), expected.log_prob.cpu())
        assert torch.equal(found.stderr.cpu(), expected.stderr.cpu())
    assert (captured.replay.graph is None) == (where == "cpu")
