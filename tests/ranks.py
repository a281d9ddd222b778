"""What tests/test_parallel.py has torchrun start: several training runs, one after the other, in the same processes.

Takes a JSON file with a list of jobs: recipe, sets, out, resume, and what happens in the step of that number:
stop_at: the last rank sends itself SIGTERM, on which all shall save and stop; kill_at: the last rank gets SIGKILL, in
its first life; hang_at: the last rank stands still. With `record`, record.pt in `out` holds, for each step, which ranks
drew pictures and the gradients that the optimizer was given; where blocks are compiled, graphs.json says into how many.
`backend` is torch.compile's, `muon` the dtype that Muon orthogonalises in, where it is not bfloat16.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from minillava.layers import sharded
from minillava.recipe import read_recipe
from minillava.training import parallel
from minillava.training.optim import Muon
from minillava.training.pipeline import run_recipe
from minillava.training.trainer import Trainer

sys.modules["matplotlib"] = None  # curves take longer than some of these runs
train_step = Trainer.train_step
compile_, backend = torch.compile, ""
torch.compile = lambda function, **options: compile_(function, backend=backend, **options)


def stand_still():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        time.sleep(1)


for job in json.loads(Path(sys.argv[1]).read_text()):
    rows = []

    def step_of(self, micros, job=job, rows=rows):
        number, last = self.step + 1, parallel.rank() == parallel.world() - 1
        if number == job.get("stop_at") and last:
            os.kill(os.getpid(), signal.SIGTERM)
        if number == job.get("kill_at") and last and not parallel.restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        if number == job.get("hang_at") and last:
            stand_still()
        if "record" in job:
            drew, step = parallel.gathered(any(m.pixels_NCHW is not None for m in micros)), self.optimizer.step

            def recorded():
                named = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
                rows.append((drew, {name: sharded.whole(grad).clone() for name, grad in named.items()}))
                step()

            self.optimizer.step = recorded
        values = train_step(self, micros)
        if "record" in job:
            self.optimizer.step = step
        return values

    Trainer.train_step = step_of
    backend = job.get("backend", "aot_eager")  # which takes seconds
    Muon.dtype = getattr(torch, job.get("muon", "bfloat16"))
    if "stage.a.compile=true" in job["sets"]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    try:
        run_recipe(read_recipe(Path(job["recipe"]), job["sets"], job["out"]), job.get("resume", False))
    except KeyboardInterrupt:
        assert job.get("stop_at")
    if rows and parallel.is_main():
        torch.save(rows, Path(job["out"]) / "record.pt")
    if "stage.a.compile=true" in job["sets"] and parallel.is_main():
        counters = torch._dynamo.utils.counters
        given_up = [key for key in counters["unimplemented"] if "limit" in key]
        graphs = {"graphs": counters["stats"]["unique_graphs"], "given_up": given_up}
        graphs["inductor"] = counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
        (Path(job["out"]) / "graphs.json").write_text(json.dumps(graphs))
    parallel.barrier()
parallel.leave()
