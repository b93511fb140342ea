"""The metrics: means and errors over batches, epochs and processes, and the callback of Lightning."""

import importlib
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from analytic import ExactNet, mixture

import fastscore as fs
from fastscore.estimator.bins import count_outside, warn_if_outside

pytest.importorskip("torchmetrics")
from fastscore.metrics import BitsPerDim, NegativeLogLikelihood

pytestmark = pytest.mark.usefixtures("one_thread")

TESTS = Path(__file__).parent
TARGET, SCHEDULE = mixture(2), fs.LogSNR(-14, 14)
X = TARGET.sample(100, seed=3)


def density(**options):
    # Without the search for a row program, which takes longer than these estimates.
    return fs.ScoreDensity(ExactNet(TARGET, SCHEDULE, **options), SCHEDULE, "eps", program=False)


def test_mean_and_errors_are_those_of_one_estimate():
    metric = NegativeLogLikelihood(density(), nfe=32, seed=5)
    for batch in X.split(30):
        metric.update(batch)
    found, whole = metric.compute(), density().estimate(X, nfe=32, seed=5)
    mean, error = whole.mean()
    # Sums of float64.
    assert float(found["nll"]) == pytest.approx(-mean, rel=1e-9)
    assert float(found["nll_stderr"]) == pytest.approx(error, rel=1e-9)
    assert float(found["nll_estimate_stderr"]) == pytest.approx(float(whole.variance.sum().sqrt()) / 100)
    assert abs(float(found["nll"]) + float(TARGET.log_prob(X).mean())) < 4 * float(found["nll_estimate_stderr"])


def test_the_errors_are_what_repetition_shows():
    """The whole error is the spread over other data, the estimates' own is the spread over seeds on the same data."""
    means, errors, exact = [], [], density()
    for seed in range(40):
        metric = NegativeLogLikelihood(exact, nfe=16, seed=seed)
        metric.update(TARGET.sample(100, seed=1000 + seed))
        means.append(float(metric.compute()["nll"]))
        errors.append(float(metric.compute()["nll_stderr"]))
    # 40 repetitions know a spread to 1 / sqrt(80).
    assert float(torch.tensor(means).std()) == pytest.approx(sum(errors) / 40, rel=4 / 80**0.5)
    means, errors = [], []
    for seed in range(40):
        metric = NegativeLogLikelihood(exact, nfe=16, seed=seed)
        metric.update(X)
        means.append(float(metric.compute()["nll"]))
        errors.append(float(metric.compute()["nll_estimate_stderr"]))
    assert float(torch.tensor(means).std()) == pytest.approx(sum(errors) / 40, rel=4 / 80**0.5)


def test_bits_per_dim_is_that_of_the_estimate():
    metric = BitsPerDim(density(), bins=256, low=-2.0, high=2.0, nfe=32)
    metric.update(X)
    found, whole = metric.compute(), density().estimate(X, nfe=32)
    bits = whole.bits_per_dim(256, -2.0, 2.0)
    assert float(found["bits_per_dim"]) == pytest.approx(float(bits.mean()), rel=1e-9)
    # What samples with the same nodes have in common adds to both errors; in two dimensions next to nothing.
    assert float(found["bits_per_dim_stderr"]) == pytest.approx(float(bits.std()) / 10, rel=1e-4)
    by_levels = BitsPerDim(density(), fs.Levels(256, -2 + 2 / 256, 2 - 2 / 256), nfe=32)  # dequantized in [-2, 2)
    by_levels.update(X)
    assert by_levels.compute() == found
    own = float(whole.variance.sum().sqrt()) / 100 / whole.dims / math.log(2)
    assert float(found["bits_per_dim_estimate_stderr"]) == pytest.approx(own, rel=1e-3)


def test_reset_starts_again_and_forward_returns_the_batch():
    metric = NegativeLogLikelihood(density(), nfe=16)
    first = metric(X[:40])
    second = metric(X[40:])
    total = metric.compute()
    assert float(total["nll"]) == pytest.approx(0.4 * float(first["nll"]) + 0.6 * float(second["nll"]), rel=1e-9)
    assert float(second["nll_stderr"]) > float(total["nll_stderr"])
    metric.reset()
    metric.update(X)
    # The same noise, sample by sample.
    assert float(metric.compute()["nll"]) == pytest.approx(float(total["nll"]), rel=1e-9)
    metric.reset()
    index = torch.arange(100)
    metric.update(X[50:], sample_index=index[50:])
    metric.update(X[:50], sample_index=index[:50])
    assert float(metric.compute()["nll"]) == pytest.approx(float(total["nll"]), rel=1e-9)


def test_the_network_is_evaluated_in_eval_mode_with_its_conditions_and_left_as_it_was():
    class Noisy(ExactNet):
        def __init__(self):
            super().__init__(TARGET, SCHEDULE)
            self.dropout = torch.nn.Dropout(0.5)
            self.fixed = torch.nn.Dropout(0.5).eval()

        def forward(self, x_t, t, shift):
            assert not self.dropout.training
            return super().forward(x_t, t, shift)

    net = Noisy()
    metric = NegativeLogLikelihood(fs.ScoreDensity(net, SCHEDULE, "eps", program=False), nfe=16)
    shift = torch.zeros(100, 2)
    for part in (slice(0, 50), slice(50, 100)):
        metric.update(X[part], shift=shift[part])
    assert (net.training, net.dropout.training, net.fixed.training) == (True, True, False)
    plain = NegativeLogLikelihood(density(), nfe=16)
    plain.update(X)
    assert float(metric.compute()["nll"]) == pytest.approx(float(plain.compute()["nll"]), rel=1e-9)


def test_the_network_is_no_part_of_the_metric():
    metric = NegativeLogLikelihood(density(gain=1.0))
    assert list(metric.parameters()) == []
    assert list(metric.state_dict()) == []


def test_one_sample_none_and_other_dimensions():
    metric = NegativeLogLikelihood(density(), nfe=16)
    with pytest.raises(ValueError, match="NegativeLogLikelihood has seen no sample"):
        metric.compute()
    metric.update(X[:1])
    found = metric.compute()
    assert math.isnan(float(found["nll_stderr"]))
    assert float(found["nll_estimate_stderr"]) > 0
    other = NegativeLogLikelihood(fs.ScoreDensity(torch.nn.Identity(), SCHEDULE, "eps"), nfe=16)
    other._density[0].model.forward = lambda x_t, t: x_t
    other.update(X[:2])
    with pytest.raises(ValueError, match="samples had 2 dimensions so far and now 1"):
        other.update(X[:2, :1])
    with pytest.raises(ValueError, match="bins >= 2"):
        BitsPerDim(density(), bins=1)


def test_data_outside_of_the_levels_are_warned_of_once(recwarn):
    metric = BitsPerDim(density(), bins=16, low=-9.0, high=9.0, nfe=16)
    metric.update(X[:4])
    x = X[:4].clone()
    x[2, 1] = 9.5
    for _ in range(2):
        metric.update(x)
    BitsPerDim(density(), nfe=16).update(x)
    (warning,) = recwarn
    assert "1 of 8 entries of the data lie outside [low, high) = [-9, 9), where the 16 levels are" in str(
        warning.message
    )


def test_two_processes_give_one_answer(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(TESTS), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(TESTS / "metric_worker.py"), str(tmp_path)]
    workers = [subprocess.Popen([*run, str(rank), "2"], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["found"] == second["found"]
    for at_work, at_the_end in (first["threads"], second["threads"]):
        assert "pt_gloo_runloop" in at_work
        assert at_the_end == []  # a thread that outlives its group can abort the process while Python shuts down
    # Every sample of both processes has an index of its own: here that of the data, which were dealt out in turns.
    assert sorted(first["seen"] + second["seen"]) == list(range(100))
    alone = BitsPerDim(density(), bins=256, nfe=32)
    alone.update(X)
    for name, value in alone.compute().items():
        assert first["found"][name] == pytest.approx(float(value), rel=1e-9)


def test_the_callback_logs_the_metric_of_a_real_training():
    lightning = pytest.importorskip("lightning")
    from fastscore.lightning import LogDensity

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = ExactNet(TARGET, SCHEDULE, gain=0.9)
            self.density = fs.ScoreDensity(self.net, SCHEDULE, "eps", program=False)

        def training_step(self, batch, batch_idx):
            return fs.density_loss(self.density, batch[0], seed=self.global_step)

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 0.02)

    module, logged = Module(), []

    class Keep(lightning.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    callback = LogDensity(NegativeLogLikelihood(module.density, nfe=16), every=2)
    data = torch.utils.data.TensorDataset(X)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=2, callbacks=[callback, Keep()], enable_checkpointing=False, **options)
    loader = torch.utils.data.DataLoader(data, batch_size=50)
    trainer.fit(module, loader, loader)
    assert "nll" not in logged[0]
    assert module.net.gain.item() > 0.9
    after = NegativeLogLikelihood(module.density, nfe=16)
    after.update(X)
    # float32 in the log.
    assert logged[1]["nll"] == pytest.approx(float(after.compute()["nll"]), rel=1e-6)
    assert logged[1]["nll_stderr"] == pytest.approx(float(after.compute()["nll_stderr"]), rel=1e-6)
    again = trainer.validate(module, loader, verbose=False)
    assert again[0]["nll"] == pytest.approx(logged[1]["nll"], rel=1e-6)
    with pytest.raises(ValueError, match="every must be at least 1"):
        LogDensity(callback.metric, every=0)


def test_data_in_the_upper_half_of_the_levels_are_warned_of():
    """Images in [0, 1) by the levels of [-1, 1) have one bit per dimension too few."""
    images = torch.rand(600, 2, generator=torch.Generator().manual_seed(0))
    density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE), SCHEDULE, "eps", program=False)
    with pytest.warns(UserWarning, match=r"all 1200 entries of the data lie in the upper .*1 too few if .*\[0, 1\)"):
        BitsPerDim(density, bins=256, nfe=16).update(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BitsPerDim(density, bins=256, low=0.0, nfe=16).update(images)
        BitsPerDim(density, bins=256, nfe=16).update(2 * images - 1)


def test_callbacks_and_loaders_are_not_averaged():
    lightning = pytest.importorskip("lightning")
    from fastscore.lightning import LogDensity

    class Module(lightning.LightningModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            pass

    def logged(loaders, *callbacks):
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(callbacks=list(callbacks), enable_checkpointing=False, **options)
        trainer.validate(Module(), loaders, verbose=False)
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def metric(gain=1.0):
        density = fs.ScoreDensity(ExactNet(TARGET, SCHEDULE, gain=gain), SCHEDULE, "eps", program=False)
        return NegativeLogLikelihood(density, nfe=16)

    def alone(x, gain=1.0):
        found = metric(gain)
        found.update(x)
        return pytest.approx(float(found.compute()["nll"]), rel=1e-6)  # float32 in the log

    far = X + 3
    loader, other = (torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=50) for x in (X, far))
    two = logged(loader, LogDensity(metric()), LogDensity(metric(0.9), prefix="ema_"))
    assert (two["nll"], two["ema_nll"]) == (alone(X), alone(X, 0.9))
    both = logged([loader, other], LogDensity(metric(), loader=0), LogDensity(metric(), loader=1, prefix="far_"))
    assert (both["nll"], both["far_nll"]) == (alone(X), alone(far))
    with pytest.raises(ValueError, match="2 LogDensity callbacks log under the name 'nll', of which Lightning"):
        logged(loader, LogDensity(metric()), LogDensity(metric(0.9)))
    with pytest.raises(ValueError, match="which of the 2 validation loaders LogDensity looks at, got None; give one"):
        logged([loader, other], LogDensity(metric()))
    with pytest.raises(ValueError, match="which of the 1 validation loaders LogDensity looks at, got 1"):
        logged(loader, LogDensity(metric(), loader=1))


@pytest.mark.parametrize(("module", "package"), [("metrics", "torchmetrics"), ("lightning", "lightning")])
def test_a_missing_package_is_named(monkeypatch, module, package):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", *["torchmetrics"] * (module == "metrics")):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"fastscore.{module}", raising=False)
    remedy = rf"needs the package {package}; install it with: pip install {package}$"
    with pytest.raises(ImportError, match=remedy):
        importlib.import_module(f"fastscore.{module}")


def test_what_rounding_puts_on_the_upper_end_is_no_warning(recwarn):
    """Dequantized data of the highest level, (255 + u) / 128 - 1, are exactly 1 once in 100,000 times in float32."""
    x = torch.full((100, 10_000), 0.5)
    x[0, :4], x[50:] = 1.0, -0.5
    counts = count_outside(x, None, -1.0, 1.0)
    assert counts.tolist() == [4, 500_000, 10**6]
    assert not warn_if_outside(counts, 256, -1.0, 1.0)
    assert not recwarn
    x[1, :100] = 1.0
    with pytest.warns(UserWarning, match="104 of 1000000 entries of the data lie outside"):
        assert warn_if_outside(count_outside(x, None, -1.0, 1.0), 256, -1.0, 1.0)


def of_index(index, nfe=32):
    metric = NegativeLogLikelihood(density(), nfe=nfe, seed=5)
    metric.update(X[index], sample_index=index)
    return metric


def test_metrics_are_merged_where_no_two_samples_have_the_same_noise():
    """By arrival both begin at 0; merged without a word, the stated error of 16 metrics was a third of the true one."""
    parts = torch.arange(100).split(30)
    one, *others = map(of_index, parts)
    for other in others:
        one.merge_state(other)
    whole = NegativeLogLikelihood(density(), nfe=32, seed=5)
    whole.update(X)
    for name, value in whole.compute().items():
        torch.testing.assert_close(one.compute()[name], value, rtol=1e-12, atol=0)  # sums of float64
    by_arrival = [NegativeLogLikelihood(density(), nfe=16) for _ in range(2)]
    for metric, x in zip(by_arrival, X.split(50)):
        metric.update(x)
    with pytest.raises(ValueError, match="order of arrival, so that samples of two have the same; pass sample_index="):
        by_arrival[0].merge_state(by_arrival[1])
    with pytest.raises(ValueError, match="order of arrival"):
        by_arrival[0].merge_state(by_arrival[1].metric_state)
    with pytest.raises(ValueError, match="order of arrival"):
        of_index(parts[0]).merge_state(by_arrival[1])
    by_arrival[0].reset()
    by_arrival[0].merge_state(by_arrival[1])  # one of them has no sample
    assert by_arrival[0].compute() == by_arrival[1].compute()


def test_metrics_of_other_dimensions_are_not_merged():
    target = mixture(3)
    other = NegativeLogLikelihood(fs.ScoreDensity(ExactNet(target, SCHEDULE), SCHEDULE, "eps", program=False), nfe=16)
    other.update(target.sample(5, seed=3), sample_index=torch.arange(200, 205))
    with pytest.raises(ValueError, match="2 dimensions in one metric and 3 in the other; keep them apart"):
        of_index(torch.arange(10)).merge_state(other)


def test_a_window_takes_the_index_of_the_data_set():
    from torchmetrics.wrappers import Running

    running = Running(NegativeLogLikelihood(density(), nfe=16), window=2)
    for _ in range(2):
        running(X[:10])
    with pytest.raises(ValueError, match="order of arrival"):
        running.compute()
    running = Running(NegativeLogLikelihood(density(), nfe=16), window=2)
    for index in torch.arange(60).split(20):
        running(X[index], sample_index=index)
    last = of_index(torch.arange(20, 60), 16)
    whole = density().estimate(X[20:60], nfe=16, sample_index=torch.arange(20, 60))
    torch.testing.assert_close(running.compute()["nll"], -whole.log_prob.double().mean(), rtol=1e-6, atol=0)
    assert last.compute()["nll"].isfinite()


@pytest.mark.parametrize("first", [True, False])
def test_an_index_is_passed_always_or_never(first):
    metric, index = NegativeLogLikelihood(density(), nfe=16), torch.arange(10)
    metric.update(X[:10], sample_index=index if first else None)
    with pytest.raises(ValueError, match="pass it always or never"):
        metric.update(X[10:20], sample_index=None if first else index)
    metric.reset()
    metric.update(X[10:20], sample_index=None if first else index)


@pytest.mark.parametrize("indexed", [True, False])
def test_an_index_is_passed_in_all_processes_or_in_none(indexed):
    """One process by arrival and one by an index: the noise of sample 0 was that of two samples, without a word."""
    here, there = (NegativeLogLikelihood(density(), nfe=16) for _ in range(2))
    index = torch.arange(10)
    here.update(X[:10], sample_index=index)
    there.update(X[10:20], sample_index=index + 10 if indexed else None)
    states = iter([getattr(there, name) for name in there._reductions])
    here.dist_sync_fn = lambda state, group: [state, next(states)]
    here.distributed_available_fn = lambda: True
    if indexed:
        expected = -density().estimate(X[:20], nfe=16).log_prob.double().mean()
        torch.testing.assert_close(here.compute()["nll"], expected, rtol=1e-6, atol=0)
    else:
        with pytest.raises(ValueError, match="10 samples have a sample_index and 10 of other processes none"):
            here.compute()
