"""What can be done to a trained adapter: files, finishing, detaching, merging, other adapters, copies."""

from __future__ import annotations

import copy
import tempfile

import torch

from effzoo.checks.models import TinyModel, last_block_at_two_positions, logits, silent, train
from effzoo.checks.peft.subject import Subject, copied, on_every_model, same
from effzoo.checks.runner import Failed, NotApplicable, close, needs
from effzoo.errors import AdapterError, IncompatibleError
from effzoo.peft import account, activate, attach, attached, detach, load_adapter, merge, save_adapter, training
from effzoo.peft.attach import adapter_tensors


@needs("attaches")
@on_every_model
def keys_are_kept(subject: Subject, case: TinyModel) -> None:
    """The base's state-dict keys are unchanged, and every new key contains .adapters.<name>.

    Compare `set(model.state_dict())` before and after `effzoo.attach(model, NAME)`.
    """
    before, after = set(case.model().state_dict()), set(subject.attached(case, "mine").state_dict())
    if missing := sorted(before - after):
        raise Failed(
            f"{len(missing)} keys of the base are gone, the first is {missing[0]}; hang a module on the "
            "site instead of replacing it"
        )
    if strangers := sorted(key for key in after - before if ".adapters.mine." not in key):
        raise Failed(f"new key {strangers[0]} lies outside .adapters.mine.; keep every tensor inside the PeftModule")


@needs("attaches")
@on_every_model
def positions_computed_alone(subject: Subject, case: TinyModel) -> None:
    """Where only some positions are computed, because all that is hung is Positionwise, they are the same

    Change x at one position and see at which others the output of the hook moves.
    """
    model = subject.trained(case)
    if not model.blocks[-1].positionwise:
        return
    alone, among = last_block_at_two_positions(model, case.batch())
    advice = (
        "Positionwise says that a hook computes each position from that position alone, but a mean, a shift or a sum "
        "goes over the sequence"
    )
    close("positions of the last block computed alone", alone, among, 1e-10, advice)


@needs("attaches")
@on_every_model
def saves_and_loads(subject: Subject, case: TinyModel) -> None:
    """Saved and loaded into a fresh copy of the base, the output is bit-identical

    Compare `module.state_dict()` with `vars(module)`: what the hooks read must be in the first, or follow from options.
    """
    model = subject.trained(case)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        torch.manual_seed(1234)  # whatever was drawn at the start must be in the file
        loaded = load_adapter(case.model(), folder)
    advice = "what is drawn or computed in `make` belongs into a parameter or a persistent buffer"
    close("the output after save and load", logits(loaded, case.batch()), logits(model, case.batch()), 0.0, advice)


@needs("saves_and_loads")
@on_every_model
def finishes(subject: Subject, case: TinyModel) -> None:
    """Finished after training, the output is the same, and a file of it loads into a fresh copy of the base

    Call `effzoo.peft.training.finish(model)` and compare the output, and the keys of the state dict, before and after.
    """
    model = subject.trained(case)
    before = logits(model, case.batch())
    training.finish(model)
    advice = "`finish` may drop what only training needed; what evaluation computes stays"
    close("the output after finish", logits(model, case.batch()), before, 1e-10, advice)
    finished = logits(model, case.batch())
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        torch.manual_seed(1234)
        loaded = load_adapter(case.model(), folder)
    advice = "shapes after `finish` must follow from the options alone, or `unpack` must bring them"
    close("the output of a finished adapter after save and load", logits(loaded, case.batch()), finished, 0.0, advice)


@needs("attaches")
@on_every_model
def detaches(subject: Subject, case: TinyModel) -> None:
    """Detaching restores the output, the keys and the requires_grad flags exactly

    Print `vars(site)` before attaching and after detaching: hooks, attributes and flags that `make` has set are left.
    """
    base = case.model()
    base.embeddings.token.weight.requires_grad_(False)
    flags, before = {n: p.requires_grad for n, p in base.named_parameters()}, logits(base, case.batch())
    tensors = copied(base.state_dict())
    model = attach(base, subject.spec)
    train(model, case.batch())
    detach(model, "default")
    advice = "keep every tensor and every change inside the PeftModule"
    same("the model after detach", model.state_dict(), tensors, advice)
    advice = "leave hooks and attributes of the site alone"
    close("the output after detach", logits(model, case.batch()), before, 0.0, advice)
    changed = [name for name, parameter in model.named_parameters() if flags[name] != parameter.requires_grad]
    if changed:
        raise Failed(
            f"requires_grad of {changed[0]} is {not flags[changed[0]]} after detach, it was "
            f"{flags[changed[0]]}; let attach do the freezing"
        )


@needs("attaches")
@on_every_model
def merges(subject: Subject, case: TinyModel) -> None:
    """Merging gives the attached output to 1e-10 and leaves no adapter, or refuses with AdapterError

    With x = I (torch.eye) the site's output is its weight: compare what `after` adds there with `delta(weight, bias)`.
    """
    model = subject.trained(case)
    before, tensors = logits(model, case.batch()), copied(model.state_dict())
    mergeable = account(model).changed is not None
    try:
        merge(model)
    except AdapterError as refusal:
        if mergeable:
            raise Failed(
                f"the account says that merging changes {account(model).changed} entries, but merge refuses: {refusal}"
            ) from None
        advice = "merge must change nothing when it cannot finish"
        same("the model after merge refused", model.state_dict(), tensors, advice)
        return
    if not mergeable:
        raise Failed("merged, although some module is no change of a weight; what it did is lost")
    if attached(model) or any(".adapters." in key for key in model.state_dict()):
        raise Failed("the adapter is still there after merge")
    advice = "`delta` must be exactly what `before` and `after` add to the weight and bias"
    close("the merged output", logits(model, case.batch()), before, 1e-10, advice)


@needs("attaches")
@on_every_model
def adapters_are_independent(subject: Subject, case: TinyModel) -> None:
    """Two adapters side by side do not influence each other

    Attach twice, train one, and compare the tensors and the output of the other; look for state on classes.
    """
    model = attach(case.model(), subject.spec, name="first")
    train(model, case.batch())
    before, tensors = logits(model, case.batch()), copied(adapter_tensors(model, "first"))
    attach(model, subject.spec, name="second")
    train(model, case.batch(), steps=2)
    advice = "keep all state in the module; nothing on the class, the method or the site"
    same("the first adapter after the second was trained", adapter_tensors(model, "first"), tensors, advice)
    activate(model, "first")
    close("the first adapter's output after the second was trained", logits(model, case.batch()), before, 0.0, advice)
    activate(model, "second")
    if torch.equal(logits(model, case.batch()), before):
        raise Failed(f"the second adapter gives the first one's output; {advice}")
    detach(model, "second")
    activate(model, "first")
    close("the first adapter's output after the second was detached", logits(model, case.batch()), before, 0.0, advice)


@needs("adapters_are_independent")
@on_every_model
def serves_mixed_batches(subject: Subject, case: TinyModel) -> None:
    """Chosen by row, two adapters give each row what they give it alone, or the method refuses

    Change row 1 of x and look whether the hook's output for row 0 moves.
    """
    model = attach(case.model(), subject.spec, name="first")
    train(model, case.batch())
    attach(model, subject.spec, name="second")
    train(model, case.batch(), steps=2)
    alone = {name: logits(activate(model, name), case.batch()) for name in ("first", "second")}
    rows = ["second", "first", "second"]
    try:
        got = logits(activate(model, rows=rows), case.batch())
    except IncompatibleError as refusal:
        raise NotApplicable(f"refused: {refusal}") from None
    expected = torch.stack([alone[name][row] for row, name in enumerate(rows)])
    advice = "hooks must treat each example by itself, and hold everything trained in parameters or buffers"
    close("a row's output", got, expected, 1e-10, advice)


@needs("attaches")
@on_every_model
def copies(subject: Subject, case: TinyModel) -> None:
    """A deep copy and a state-dict round trip give the same output, and a copy shares nothing

    `copy.deepcopy(model)`, train the copy, and see whether the original moves; look for closures, and tensors in lists.
    """
    model = subject.trained(case)
    before, duplicate = logits(model, case.batch()), copy.deepcopy(model)
    advice = "hold no reference to tensors outside the module"
    close("a deep copy's output", logits(duplicate, case.batch()), before, 0.0, advice)
    if wrong := silent(duplicate, train(duplicate, case.batch())):
        raise Failed(f"in a deep copy {wrong}; hold no reference to tensors outside the module, closures included")
    close("the output after a deep copy was trained", logits(model, case.batch()), before, 0.0, advice)
    torch.manual_seed(4321)
    other = subject.attached(case)
    other.load_state_dict(model.state_dict())
    advice = "make what is drawn a parameter or a persistent buffer"
    close("the output after a state-dict round trip", logits(other, case.batch()), before, 0.0, advice)
