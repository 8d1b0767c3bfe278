"""A whole training process has one OpenMP runtime, whatever the data set brings along."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys
from knl import native
from knl.comm.collectives import Alone, Ranks
from knl.comm.world import SINGLE
from knl.config import load_recipe
from knl.data.dataset import open_dataset
from knl.train.trainer import Trainer
recipe = load_recipe(sys.argv[1], ["train.layout=channels_last", "comm.bucket_mb=16"])
trainer = Trainer(recipe, open_dataset(recipe.data, 0), Ranks(SINGLE, Alone()))
trainer.step(0)
trainer.evaluate()
print(json.dumps(native.openmp_runtimes()))
"""


def test_training_digits_leaves_torchs_openmp_runtime_alone_in_the_process():
    command = [sys.executable, "-c", CODE, "digits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (runtime,) = json.loads(done.stdout)
    assert "/torch/lib/" in runtime
