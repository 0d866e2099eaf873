"""One of several processes is killed: the others end with an error, checkpoints are whole, and the run goes on."""

import json
import os
import re
import subprocess

import pytest
from support import launcher

from effzoo.train import checkpoints

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
import effzoo
from effzoo.train import Callback, Saving

class Kill(Callback):
    def on_gradients(self, loop):
        if loop.step == 5 and loop.processes.index == int(os.environ["KILLED"]):
            os.kill(os.getpid(), signal.SIGKILL)

torch.manual_seed(0)
small = dict(layers=1, dim=16, heads=2, mlp=32, vocab=53, max_length=64, dropout=0.1, attention_dropout=0.0)
model = effzoo.build("bert", task="classification", num_labels=3, peft="lora[rank=2]", **small)
rows = [{"input_ids": [2 + i % 9, 3, 4 + i % 5], "labels": i % 3} for i in range(30)]
if os.environ.get("NAN") == os.environ["RANK"]:
    class Bad(Callback):
        def on_step_start(self, loop):
            if loop.step == 2 and os.environ["SPOILT"] == "weight":
                next(p for p in loop.model.parameters() if p.requires_grad).data[0] = float("nan")
        def on_update(self, loop):
            if loop.step == 2 and os.environ["SPOILT"] == "loss":
                loop.measured.losses["loss"] *= float("nan")
    callbacks = [Bad()]
else:
    callbacks = [Kill()] if "KILLED" in os.environ else []
result = effzoo.finetune(model, rows, output_dir=sys.argv[1], batch_size=2, max_steps=8, learning_rate=1e-2,
                         progress=False, resume=True, callbacks=callbacks,
                         saving=Saving(log_every=int(os.environ.get("LOG_EVERY", "1")), save_every=2))
if os.environ["RANK"] == "0":
    Path(sys.argv[1], "result.json").write_text(json.dumps(result.history))
"""


def run(folder, **variables):
    """The exit status of four processes and what they wrote to stderr, within a minute."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [*launcher(4), str(script), str(folder / "out")], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_a_killed_process_ends_all_and_the_run_goes_on(tmp_path, sharded):
    variables = {"ACCELERATE_USE_FSDP": sharded, "FSDP_VERSION": "2"}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    straight.mkdir()
    stopped.mkdir()
    assert run(straight, **variables)[0] == 0
    status, said = run(stopped, **variables, KILLED="2")
    assert (status != 0 and "SIGKILL" in said) or "-9" in said
    saved = checkpoints.whole(stopped / "out")
    assert [path.name for path in saved] == ["checkpoint-2", "checkpoint-4"]
    for path in saved:
        checkpoints.check_whole(path)
    assert run(stopped, **variables)[0] == 0
    history = [json.loads((folder / "out" / "result.json").read_text()) for folder in (straight, stopped)]
    assert history[0] == history[1], "the same bits"


@pytest.mark.slow
@pytest.mark.parametrize(("spoilt", "log_every"), [("loss", "1"), ("weight", "100")])
def test_a_loss_that_is_no_number_in_one_process_stops_all(tmp_path, spoilt, log_every):
    """A logged loss, and one that no log would meet, whose gradient is no number either."""
    status, said = run(tmp_path, NAN="3", SPOILT=spoilt, LOG_EVERY=log_every)
    assert status != 0
    assert len(re.findall("TrainingError: the loss is nan at step 3", said)) == 4, said[-3000:]
