"""What tests/test_parallel.py has torchrun start: several training runs, one after the other, in the same processes.

Takes a JSON file with a list of jobs: recipe, sets, out, resume, and stop_at: after so many steps the last rank sends
itself SIGTERM, on which all shall save and stop; kill_at: so in its first life, SIGKILL.
"""

import json
import os
import signal
import sys
from pathlib import Path

from minillava import parallel
from minillava.pipeline import run_recipe
from minillava.recipe import read_recipe
from minillava.trainer import Trainer

train_step = Trainer.train_step

for job in json.loads(Path(sys.argv[1]).read_text()):

    def stopping(self, micros, job=job):
        if self.step + 1 == job.get("stop_at") and parallel.rank() == parallel.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.step + 1 == job.get("kill_at") and parallel.rank() and not parallel.restarted():
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, micros)

    Trainer.train_step = stopping
    try:
        run_recipe(read_recipe(Path(job["recipe"]), job["sets"], job["out"]), job.get("resume", False))
    except KeyboardInterrupt:
        assert job.get("stop_at")
    parallel.barrier()
