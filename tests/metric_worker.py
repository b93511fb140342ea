"""One of the processes of the test of distributed metrics: evaluates its share and writes what `compute` says."""

import json
import sys
from pathlib import Path

import torch
from analytic import ExactNet, mixture
from processes import gloo_threads
from torch import distributed

import fastscore as fs
from fastscore.metrics import BitsPerDim

if __name__ == "__main__":
    folder, rank, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    target, schedule = mixture(2), fs.LogSNR(-14, 14)
    density = fs.ScoreDensity(ExactNet(target, schedule), schedule, "eps", program=False)
    seen, estimate = [], density.estimate

    def recording(x, **options):
        seen.extend(options["sample_index"].tolist())
        return estimate(x, **options)

    density.estimate = recording
    metric = BitsPerDim(density, bins=256, nfe=32)
    share = target.sample(100, seed=3)[rank::processes]
    for batch in share.split(16 if rank == 0 else 30):  # another number of batches in every process
        metric.update(batch)
    found = {name: float(value) for name, value in metric.compute().items()}
    before = gloo_threads()
    distributed.destroy_process_group()
    report = {"found": found, "seen": seen, "threads": [before, gloo_threads()]}
    (folder / f"{rank}.json").write_text(json.dumps(report))
