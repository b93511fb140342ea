"""Repeated calls on a GPU: how much they launch, that nothing crosses or waits, and that nothing stale is replayed.

The device is pretended: a captured graph runs the captured operations again on the same memory, as a CUDA graph does.
"""

import copy
import itertools
import threading

import pytest
import torch
from pretended_device import CUDA, PretendedDevice
from test_plan import CHANGES, FIXED, NFE, Net, data

import fastscore as fs
from fastscore.estimator import replay
from fastscore.ops import noise
from fastscore.reference.gaussians import Reference


@pytest.fixture
def device():
    with PretendedDevice() as pretended:
        yield pretended


def make(schedule=None, **options):
    torch.manual_seed(0)
    return fs.ScoreDensity(Net().eval().cuda(), schedule or fs.VP(), **options)


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
    "times in float64": {"time_dtype": torch.float64},
}
# Launches of a repeated call, at most: the copy of x, the graph, and four copies of what it has found. Another seed
# takes an index and two kernels for the words, the rounding of the rows' numbers, and two copies more.
REPEATED, NEW_SEED = 6, 12


def counted(name, fitted):
    options = dict(COUNTED[name])
    schedule = options.pop("schedule", fs.VP)()
    if "reference" in options:
        options["reference"] = options["reference"]()
    density = make(schedule, **options)
    if fitted:
        density.fit(data(200, seed=4).cuda(), evaluations=120_000, progress=False)
    return density, data(3).cuda()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_repeated_estimate_is_one_graph_without_crossings_or_waits(device, name, fitted):
    density, x = counted(name, fitted)
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
@pytest.mark.parametrize("fitted", [False, True], ids=["", "fitted"])
@pytest.mark.parametrize("name", COUNTED)
def test_a_new_seed_takes_few_launches_more(device, word_kernels, name, fitted):
    density, x = counted(name, fitted)
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [change for change in CHANGES if "numpy" not in change])
def test_nothing_stale_is_replayed_after(device, change):
    density, x = make(), data().cuda()
    agree(density, x)
    assert len(replays(density)) == 1
    CHANGES[change](density)
    agree(density, x.double() if change == "float64" else x)


def test_seeds_data_conditions_and_shapes_in_turns(device):
    density, x = make(), data().cuda()
    calls = [{}, {"seed": 1}, {}, {"seed": 1}, {"sample_index": torch.arange(60, 60 + len(x))}, {}, {"seed": 2}, {}]
    for options in calls:
        agree(density, x, **options)
        agree(density, data(seed=9).cuda(), **options)
    assert 1 <= len(replays(density)) <= 2  # the default indices, and the others
    for count in range(2, 2 * replay.KEPT):
        agree(density, data(count).cuda())
    assert len(replays(density)) <= replay.KEPT


class Labelled(Net):
    def forward(self, x, t, label, scale):
        return super().forward(x, t) * scale + label[:, None]


def test_conditions_are_copied_and_their_values_count(device):
    torch.manual_seed(0)
    density, x = fs.ScoreDensity(Labelled().eval().cuda(), fs.VP()), data(6).cuda()
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [c for c in CHANGES if c not in FIXED and "numpy" not in c])
def test_a_captured_graph_follows_the_network_and_the_schedule(device, change):
    density, x = make(), data().cuda()
    captured = fs.CapturedDensity(density, x, nfe=NFE)
    captured(x)
    CHANGES[change](density)
    expected = copy.deepcopy(density).estimate(x, nfe=NFE, progress=False)
    for _ in range(2):
        found = captured(x)
        assert torch.equal(found.log_prob.cpu(), expected.log_prob.cpu())
        assert torch.equal(found.stderr.cpu(), expected.stderr.cpu())
    assert captured.replay.graph is not None
