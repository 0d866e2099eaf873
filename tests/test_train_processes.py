"""Training over several processes, and through SIGKILL: the losses of one undisturbed process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import launcher

ENVIRONMENT = {
    **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent),
}  # fmt: skip

TAUGHT = ("loss_labels", "loss_logits", "loss_hidden", "loss_attention")

SHARED = '''
import json, os, random, sys
from pathlib import Path
import torch
import effzoo
from effzoo.train import Optimisation, Saving
from transformers import TrainerCallback

TINY = {"dim": 16, "layers": 2, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64,
        "dropout": 0.0, "attention_dropout": 0.0}

def rows(task, count=25, classes=3):
    """Rows of unequal length and, per token, of very unequal numbers of labels; the last
    of an epoch is alone in its batch of 8."""
    draw = random.Random(0)
    found = []
    for index in range(count):
        ids = [draw.randrange(2, 53) for _ in range(draw.randrange(4, 20))]
        row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if task == "classification":
            row["label"] = ids[0] % classes
        elif task == "causal_lm":
            row["labels"] = [-100] * draw.randrange(len(ids) - 1) + ids
            row["labels"] = row["labels"][:len(ids)]
        else:
            row["labels"] = [token if draw.random() < (0.9 if index % 5 == 0 else 0.1) else -100 for token in ids]
        found.append(row)
    return found

def build(name="bert", dropout=0.0, **options):
    torch.manual_seed(0)
    return effzoo.build(name, **{**TINY, "dropout": dropout, "attention_dropout": dropout}, **options)

def tensors(model):
    return {key: value.tolist() for key, value in model.state_dict().items() if ".adapters." in key}
'''

CASES = (
    SHARED
    + '''
SETTINGS = dict(max_steps=8, learning_rate=1e-2, progress=False)
SETTINGS["saving"] = Saving(log_every=1, save_every=None, evaluate_every=4)

def cases(directory, processes):
    """Losses by case; the global batch is 8 (or 8 accumulated from 4) whatever the number of processes."""
    found = {}
    for case, name, task, peft in [
        ("classification", "bert", "classification", "lora[rank=2]"),
        ("every parameter", "bert", "classification", None),
        ("masked", "roberta", "masked_lm", "lora[rank=2]"),
        ("causal", "gpt2", "causal_lm", "prefix[length=3]"),
    ]:
        for accumulation in (1, 2):
            model = build(name, task=task, peft=peft, num_labels=3)
            data = rows(task)
            result = effzoo.finetune(model, data, evaluate=data[:9], output_dir=directory / case / str(accumulation),
                                     batch_size=8 // processes // accumulation,
                                     optimisation=Optimisation(gradient_accumulation=accumulation),
                                     metrics=order_of_labels, **SETTINGS)
            found[f"{case}, {accumulation} accumulated"] = result.history
    model = build("longformer", attention="longformer[window=4]", task="token_classification", num_labels=53,
                  peft="lora[rank=2, targets=attn.*_global]")
    data = [{**row, "global_attention_mask": [int(index == 0)] + [0] * (len(row["input_ids"]) - 1)}
            for index, row in enumerate(rows("tokens"))]
    result = effzoo.finetune(model, data, output_dir=directory / "globals", **SETTINGS, batch_size=8 // processes)
    found["global tokens in one row only"] = result.history
    student = build("roberta", task="masked_lm", peft="lora[rank=2]")
    teacher = build("roberta", task="masked_lm", attention="local[chunk=4]")
    result = effzoo.finetune(student, rows("masked_lm"), output_dir=directory / "taught", **SETTINGS,
                             batch_size=8 // processes, teacher=teacher,
                             distillation={"hidden": 1.0, "attention": 1.0, "share": 0.75})
    found["with a teacher"] = result.history
    return found

def order_of_labels(prediction):
    """Depends on the order of the rows, and on logits and labels staying together."""
    logits, labels = prediction
    labels = labels.reshape(len(labels), -1)
    order = sum((index + 1) * float(row[row >= 0].sum()) for index, row in enumerate(labels))
    return {"order": order, "size": float(len(logits))}

class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt

def resumed(directory):
    """History and adapter of a run with dropout, whole and interrupted after step 5."""
    settings = dict(max_steps=9, batch_size=3, learning_rate=1e-2, progress=False,
                    saving=Saving(log_every=1, save_every=2), output_dir=directory / "whole")
    data, found = rows("classification"), {}
    model = build(task="classification", num_labels=3, peft="lora", dropout=0.2)
    found["whole"] = effzoo.finetune(model, data, **settings).history, tensors(model)
    settings["output_dir"] = directory / "stopped"
    try:
        stopping = build(task="classification", num_labels=3, peft="lora", dropout=0.2)
        effzoo.finetune(stopping, data, **settings, callbacks=[Stop()])
    except KeyboardInterrupt:
        pass
    model = build(task="classification", num_labels=3, peft="lora", dropout=0.2)
    found["resumed"] = effzoo.finetune(model, data, **settings, resume=True).history, tensors(model)
    return found

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = {"cases": cases(directory, 2), "resumed": resumed(directory)}
    if os.environ["RANK"] == "0":
        (directory / "found.json").write_text(json.dumps(found))
'''
)


LAUNCHED = (
    SHARED
    + '''
def losses(directory, processes):
    """Of a masked language model, whose rows have unequally many labels, at a global batch of 8."""
    model = build("roberta", task="masked_lm", peft="lora[rank=2]")
    result = effzoo.finetune(model, rows("masked_lm"), output_dir=directory, batch_size=8 // processes, max_steps=4,
                             learning_rate=1e-2, progress=False, saving=Saving(log_every=1, save_every=2))
    return [entry["loss"] for entry in result.history]

class Passes:
    """A stream of 9 rows: the last of a pass is alone in its batch of 8, and one process gets none."""

    def __iter__(self):
        return iter(rows("masked_lm")[:9])

class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

def of_stream(directory, processes):
    """Losses and evaluations of a stream in two passes, and those of the same run with dropout, interrupted after step
    3 and resumed, beside the whole one."""
    settings = dict(evaluate=Passes(), batch_size=8 // processes, max_steps=5, learning_rate=1e-2, progress=False,
                    saving=Saving(log_every=1, save_every=1, evaluate_every="epoch", keep=None))
    model = build("roberta", task="masked_lm", peft="lora[rank=2]")
    found = {"plain": effzoo.finetune(model, Passes(), output_dir=directory / "plain", **settings).history}
    for name, calls in {"whole": (), "stopped": (Stop(),)}.items():
        model = build("roberta", task="masked_lm", peft="lora[rank=2]", dropout=0.2)
        try:
            result = effzoo.finetune(model, Passes(), output_dir=directory / name, callbacks=calls, **settings)
            found[name] = result.history
        except KeyboardInterrupt:
            model = build("roberta", task="masked_lm", peft="lora[rank=2]", dropout=0.2)
            result = effzoo.finetune(model, Passes(), output_dir=directory / name, resume=True, **settings)
            found["resumed"] = result.history
    return found

class Steers(effzoo.train.Callback):
    """In the first process alone."""

    def on_step_end(self, loop):
        if loop.main and loop.step == 2:
            loop.want("evaluate", "save")

    def on_log(self, loop, entry):
        if loop.main and loop.step == 3:
            loop.stop()

def steered(directory):
    """The steps that were logged and evaluated, and the checkpoints."""
    settings = dict(max_steps=6, batch_size=4, progress=False, callbacks=[Steers()],
                    saving=Saving(log_every=3, save_every=None, evaluate_every=None))
    model = build("roberta", task="masked_lm", peft="lora[rank=2]")
    data = rows("masked_lm")
    history = effzoo.finetune(model, data, evaluate=data, output_dir=directory, **settings).history
    return [[entry["step"], "eval_loss" in entry] for entry in history], [path.name for path in directory.glob("c*")]

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    found = losses(directory / "two", 2), of_stream(directory / "streams", 2), steered(directory / "steered")
    if os.environ["RANK"] == "0":
        (directory / "found.json").write_text(json.dumps(found))
'''
)


def launched(text, directory):
    """A script, imported, and what two processes of it under `accelerate launch` found; --multi_gpu is how it starts
    several, here on the CPU."""
    script = directory / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [*launcher(2), str(script), str(directory)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    spec = importlib.util.spec_from_file_location("script", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((directory / "found.json").read_text())


def test_a_launch_of_two_processes_has_the_losses_of_one_also_of_a_stream(tmp_path):
    script, (found, streamed, steered) = launched(LAUNCHED, tmp_path)
    assert steered == [[[2, True], [3, True]], ["checkpoint-2"]], "what one process asks for, all do"
    assert found == pytest.approx(script.losses(tmp_path / "one", 1), rel=1e-5, abs=1e-5) and len(found) == 4
    assert streamed["resumed"] == streamed["whole"], "to the same bits"
    alone = script.of_stream(tmp_path / "one stream", 1)["plain"]
    assert [entry["epoch"] for entry in alone] == [0, 1, 1, 2, 2]
    for one, two in zip(alone, streamed["plain"], strict=True):
        assert ("eval_loss" in one) == (one["step"] in (2, 4, 5))
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launched(CASES, tmp_path_factory.mktemp("two"))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_at_the_same_global_batch(two, tmp_path):
    script, found = two
    for case, history in script.cases(tmp_path, processes=1).items():
        other = found["cases"][case]
        assert [entry["step"] for entry in history] == [entry["step"] for entry in other] == list(range(1, 9))
        for one, many in zip(history, other, strict=True):
            assert one.keys() == many.keys()
            for key in one.keys() & {
                "loss",
                "eval_loss",
                "eval_accuracy",
                "eval_perplexity",
                "eval_order",
                "eval_size",
                *TAUGHT,
            }:
                assert many[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), f"{case}: {key} at step {one['step']}"


@pytest.mark.slow
def test_accumulating_gradients_changes_no_loss(two):
    _, found = two
    for case in ("classification", "every parameter", "masked", "causal"):
        once, twice = (found["cases"][f"{case}, {accumulation} accumulated"] for accumulation in (1, 2))
        assert [e["loss"] for e in once] == pytest.approx([e["loss"] for e in twice], rel=1e-5, abs=1e-5), case


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits_with_dropout(two):
    _, found = two
    assert found["resumed"]["resumed"] == found["resumed"]["whole"]


KILLED = (
    SHARED
    + '''
import re, shutil, signal, time
from effzoo.train import checkpoints
from effzoo.train import loop

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step
    def on_optimizer_step(self, args, state, control, **_):
        if state.global_step == self.step:
            kill()

def train(directory, name, callbacks=(), resume=False):
    """14 steps with dropout, two active adapters, a checkpoint every third step."""
    model = build(task="classification", num_labels=3, peft="lora[rank=2]", dropout=0.2)
    effzoo.attach(model, "prefix[length=2]", name="second")
    effzoo.activate(model, "default", "second")
    data = rows("classification")
    result = effzoo.finetune(model, data, evaluate=data[:5], output_dir=directory / name,
                             max_steps=14, batch_size=3, learning_rate=1e-2, progress=False,
                             saving=Saving(evaluate_every=4, log_every=2, save_every=3, keep=1),
                             callbacks=list(callbacks), resume=resume)
    (directory / f"{name}.json").write_text(json.dumps([result.history, tensors(model)]))

def loadable(path):
    model = build(task="classification", num_labels=3, peft="lora[rank=2]", dropout=0.2)
    effzoo.attach(model, "prefix[length=2]", name="second")
    effzoo.activate(model, "default", "second")
    checkpoints.load_weights(model, path)
    state = checkpoints.read_state(path)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(state["parameters"]) == trainable and state["optimizer"]["state"] and len(state["random"]) == 1

def nth_call(place, name, n, then=kill, before=True):
    """Replace place.name so that its n-th call is killed, before or after it did its work."""
    real, calls = getattr(place, name), []
    def counted(*arguments, **options):
        calls.append(None)
        if len(calls) == n and before:
            then()
        result = real(*arguments, **options)
        if len(calls) == n:
            then()
        return result
    setattr(place, name, counted)

def half_a_file(n):
    """The n-th state file is cut in the middle."""
    real, calls = checkpoints.write_state, []
    def cut(folder, state):
        calls.append(None)
        real(folder, state)
        if len(calls) == n:
            with open(folder / "state.safetensors", "r+b") as file:
                file.truncate(100)
            kill()
    loop.checkpoints.write_state = cut

def half_removed():
    """The first old checkpoint has lost a file."""
    def cut(path, ignore_errors=False):
        if path.exists() and "checkpoint-" in path.name:
            next(path.glob("*.json")).unlink()
            kill()
    shutil.rmtree = cut

SCENES = {
    "before the first checkpoint": lambda: [KillAt(1)],
    "between checkpoints": lambda: [KillAt(7)],
    "in the last step": lambda: [KillAt(13)],
    "while the state is written": lambda: half_a_file(2),
    "while the adapters are written": lambda: nth_call(checkpoints, "save_adapter", 4),
    "before the rename": lambda: nth_call(Path, "rename", 4),
    "after the rename": lambda: nth_call(Path, "rename", 2, before=False),
    "while the old one is removed": half_removed,
}

def forked(work):
    """The exit status of work() in a child of this process, which has imported everything and computed nothing."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
    return child

def status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def check(directory, name):
    """Every checkpoint under a real name loads; a resumed run ends without leftovers."""
    for path in sorted((directory / name).glob("checkpoint-*")):
        assert status(forked(lambda path=path: loadable(path))) == 0, path
    # without what was drawn
    left = sorted(re.sub("-[a-z0-9_]{8}$", "", path.name) for path in (directory / name).glob("*"))
    assert status(forked(lambda: train(directory, name, resume=True))) == 0
    assert not list((directory / name).glob(".partial*")) and not list((directory / name).glob(".removed*"))
    return left

if __name__ == "__main__":
    torch.set_num_threads(1)
    directory, found = Path(sys.argv[1]), {}
    start = time.monotonic()
    assert status(forked(lambda: train(directory, "whole"))) == 0
    taken = time.monotonic() - start
    for name, prepare in SCENES.items():
        assert status(forked(lambda: train(directory, name, prepare() or ()))) == -signal.SIGKILL, name
        found[name] = check(directory, name)
    for number in range(3):
        child = forked(lambda: train(directory, f"moment {number}"))
        time.sleep(taken * (0.45 + 0.2 * number))
        os.kill(child, signal.SIGKILL)
        found[f"moment {number}"] = [str(status(child)), *check(directory, f"moment {number}")]
    (directory / "found.json").write_text(json.dumps(found))
'''
)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    whole = json.loads((tmp_path / "whole.json").read_text())
    left = json.loads((tmp_path / "found.json").read_text())
    assert len(left) == 11
    for name in left:
        assert json.loads((tmp_path / f"{name}.json").read_text()) == whole, f"killed {name}, which left {left[name]}"
    assert left["before the first checkpoint"] == []
    assert left["between checkpoints"] == ["checkpoint-6"]
    assert left["while the state is written"] == [".partial-6", "checkpoint-3"]
    assert left["while the adapters are written"] == [".partial-6", "checkpoint-3"]
