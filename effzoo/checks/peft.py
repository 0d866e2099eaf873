"""What every PEFT method must hold, on an encoder and a decoder, with full and with windowed attention and global tokens."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from effzoo.architectures import Transformer
from effzoo.checks.declared import check_docstring, check_options, suitable
from effzoo.checks.models import Case, logits, silent, train
from effzoo.checks.runner import Check, Failed, NotApplicable, close, needs
from effzoo.errors import AdapterError, IncompatibleError, IncompatiblePeft
from effzoo.peft import Method, account, activate, attach, attached, detach, load_adapter, merge, save_adapter, training
from effzoo.peft.attach import adapter_tensors, base_tensors
from effzoo.registry import peft as registry
from effzoo.spec import Spec, parse_one

WINDOW = "longformer[window=8]"
REVERSIBLE = Case("bert", "full", choices=(("norm", "pre"), ("residual", "reversible")))
CASES = (Case("bert", "full"), Case("gpt2", "full"), Case("bert", WINDOW, has_global=True), Case("gpt2", WINDOW, has_global=True))


@dataclass
class Subject:
    """One PEFT method under check: its class and the small options it is attached with."""

    spec: Spec
    cls: type[Method]

    @classmethod
    def of(cls, given: str) -> Subject:
        method = registry.get(parse_one(given).name)
        return cls(suitable(registry, given, lambda spec: cls(spec, method).attached(CASES[0])), method)

    @property
    def identity_at_init(self) -> bool:
        """Whether the method says that attaching leaves the output as it is."""
        return bool(registry.create(self.spec).identity_at_init)

    def attached(self, case: Case, name: str = "default") -> Transformer:
        return attach(case.model(), self.spec, name=name)

    def trained(self, case: Case) -> Transformer:
        """A model with the method attached and moved away from its start by three steps."""
        model = self.attached(case)
        train(model, case.batch())
        return model


def on_every_model(check: Callable[[Subject, Case], None]) -> Check:
    """Run a check on each of the `CASES`; what goes wrong is told with the model's name."""

    @functools.wraps(check)
    def run(subject: Subject) -> None:
        refusals: list[str] = []
        for case in CASES:
            try:
                check(subject, case)
            except IncompatiblePeft as refusal:
                refusals.append(str(refusal))
            except Exception as error:
                error.add_note(str(case))
                raise
        if len(refusals) == len(CASES):
            raise NotApplicable(refusals[0])

    return run


def unless_refused(check: Callable[[Subject], None]) -> Check:
    """Run a check on its one model; a method that refuses the model need not have the property."""

    @functools.wraps(check)
    def run(subject: Subject) -> None:
        try:
            check(subject)
        except IncompatiblePeft as refusal:
            raise NotApplicable(str(refusal)) from None

    return run


def same(what: str, found: dict[str, Tensor], expected: dict[str, Tensor], advice: str) -> None:
    """Fail unless two sets of tensors have the same names and are bit-identical."""
    for name in [*expected, *(name for name in found if name not in expected)]:
        if name not in found or name not in expected:
            raise Failed(f"{what}: {name} is {'missing' if name in expected else 'new'}; {advice}")
        if not torch.equal(found[name], expected[name]):
            different = int((found[name] != expected[name]).sum()) if found[name].shape == expected[name].shape else found[name].numel()
            raise Failed(f"{what}: {name} differs in {different} of {found[name].numel()} entries; {advice}")


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def declares_itself(subject: Subject) -> None:
    """Options are keyword-only with a type and a default, and a docstring says what is computed"""
    check_options(registry, subject.cls, leading=0)
    check_docstring(subject.cls)


@on_every_model
def attaches(subject: Subject, case: Case) -> None:
    """Attaches to an encoder and a decoder, with full and with windowed attention, and runs"""
    model = subject.attached(case)
    out = logits(model, case.batch())
    close("the output", out, out, 0.0, "start the new tensors from finite values")


@needs("attaches")
@on_every_model
def starts_as_identity(subject: Subject, case: Case) -> None:
    """Right after attaching the output is unchanged, or the method says that it is not"""
    before, after = logits(case.model(), case.batch()), logits(subject.attached(case), case.batch())
    if subject.identity_at_init:
        close("the output right after attaching", after, before, 1e-10, "start from a change of 0, or declare identity_at_init = False")
    elif torch.equal(before, after):
        raise Failed("identity_at_init is False, yet the output is bit-identical to the base's; declare it True, or find out why nothing acts")


@needs("attaches")
@on_every_model
def base_is_frozen(subject: Subject, case: Case) -> None:
    """After three AdamW steps with weight decay every tensor of the base is bit-identical"""
    model = subject.attached(case)
    before = copied(base_tensors(model))
    thawed = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".adapters." not in name]
    if thawed:
        raise Failed(f"{thawed[0]} of the base is trainable after attaching ({len(thawed)} tensors); `make` must not touch requires_grad of the site")
    train(model, case.batch())
    same("the base after training", base_tensors(model), before, "train tensors of your own module; return changed weights, never write into them")


@needs("attaches")
@on_every_model
def everything_learns(subject: Subject, case: Case) -> None:
    """Every trainable tensor gets a finite gradient that is not 0 within three steps"""
    _learns(subject, case, checkpointing=False)


@needs("everything_learns")
@on_every_model
def learns_under_checkpointing(subject: Subject, case: Case) -> None:
    """The same under gradient checkpointing"""
    _learns(subject, case, checkpointing=True)


@needs("everything_learns")
@unless_refused
def learns_in_reversible_blocks(subject: Subject) -> None:
    """The same in reversible blocks, which compute their inputs back, above frozen embeddings

    An adapter's tensor must be a parameter of the block that uses it, or its gradient is lost.
    """
    _learns(subject, REVERSIBLE, checkpointing=False)


@needs("everything_learns")
@unless_refused
def runs_in_half_precision(subject: Subject) -> None:
    """Under bfloat16 autocast the loss is finite and near that in full precision, and every gradient is finite"""
    case = CASES[0]
    model, batch = subject.attached(case).float(), case.batch()
    exact = float(model(**batch).loss.detach())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**batch).loss
    loss.backward()
    close("the loss under autocast", loss.detach().double(), torch.tensor(exact).double(), 0.1 * abs(exact), "cast trained vectors to what they meet")
    broken = [name for name, parameter in model.named_parameters() if parameter.grad is not None and not parameter.grad.isfinite().all()]
    if broken:
        raise Failed(f"under autocast the gradient of {broken[0]} is not finite; compute in float32 where numbers are large")


def _learns(subject: Subject, case: Case, checkpointing: bool) -> None:
    model = subject.attached(case)
    model.checkpointing = checkpointing
    start = copied(adapter_tensors(model, "default"))
    if wrong := silent(model, train(model, case.batch())):
        raise Failed(f"{wrong}; remove what is not used, or say in zero_gradient why it vanishes")
    if all(torch.equal(start[name], tensor) for name, tensor in adapter_tensors(model, "default").items()):
        raise Failed("no tensor of the adapter moved in three steps")


@needs("attaches")
@on_every_model
def keys_are_kept(subject: Subject, case: Case) -> None:
    """The base's state-dict keys are unchanged, and every new key contains .adapters.<name>."""
    before, after = set(case.model().state_dict()), set(subject.attached(case, "mine").state_dict())
    if missing := sorted(before - after):
        raise Failed(f"{len(missing)} keys of the base are gone, the first is {missing[0]}; hang a module on the site instead of replacing it")
    if strangers := sorted(key for key in after - before if ".adapters.mine." not in key):
        raise Failed(f"new key {strangers[0]} lies outside .adapters.mine.; keep every tensor inside the PeftModule")
    if after == before:
        raise Failed("attaching added no tensor; return a PeftModule with parameters from `make`")


@needs("attaches")
@on_every_model
def saves_and_loads(subject: Subject, case: Case) -> None:
    """Saved and loaded into a fresh copy of the base, the output is bit-identical"""
    model = subject.trained(case)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        torch.manual_seed(1234)  # whatever was drawn at the start must be in the file
        loaded = load_adapter(case.model(), folder)
    advice = "what is drawn or computed in `make` belongs into a parameter or a persistent buffer"
    close("the output after save and load", logits(loaded, case.batch()), logits(model, case.batch()), 0.0, advice)


@needs("saves_and_loads")
@on_every_model
def finishes(subject: Subject, case: Case) -> None:
    """Finished after training, the output is the same, and a file of it loads into a fresh copy of the base"""
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


@needs("adapters_are_independent")
@on_every_model
def serves_rows(subject: Subject, case: Case) -> None:
    """Chosen by row, two adapters give each row what they give it alone, or the method refuses"""
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
    close("a row's output", got, expected, 1e-10, "doors must treat each example by itself, and hold everything trained in parameters or buffers")


@needs("attaches")
@on_every_model
def detaches(subject: Subject, case: Case) -> None:
    """Detaching restores the output, the keys and the requires_grad flags exactly"""
    base = case.model()
    base.embeddings.token.weight.requires_grad_(False)
    flags, before, tensors = ({n: p.requires_grad for n, p in base.named_parameters()}, logits(base, case.batch()), copied(base.state_dict()))
    model = attach(base, subject.spec)
    train(model, case.batch())
    detach(model, "default")
    same("the model after detach", model.state_dict(), tensors, "keep every tensor and every change inside the PeftModule")
    close("the output after detach", logits(model, case.batch()), before, 0.0, "leave hooks and attributes of the site alone")
    changed = [name for name, parameter in model.named_parameters() if flags[name] != parameter.requires_grad]
    if changed:
        raise Failed(f"requires_grad of {changed[0]} is {not flags[changed[0]]} after detach, it was {flags[changed[0]]}; let attach do the freezing")


@needs("attaches")
@on_every_model
def merges(subject: Subject, case: Case) -> None:
    """Merging gives the attached output to 1e-10 and leaves no adapter, or refuses with AdapterError"""
    model = subject.trained(case)
    before, tensors, mergeable = (logits(model, case.batch()), copied(model.state_dict()), account(model).changed is not None)
    try:
        merge(model)
    except AdapterError as refusal:
        if mergeable:
            raise Failed(f"the account says that merging changes {account(model).changed} entries, but merge refuses: {refusal}") from None
        same("the model after merge refused", model.state_dict(), tensors, "merge must change nothing when it cannot finish")
        return
    if not mergeable:
        raise Failed("merged, although some module is no change of a weight; what it did is lost")
    if attached(model) or any(".adapters." in key for key in model.state_dict()):
        raise Failed("the adapter is still there after merge")
    advice = "`delta` must be exactly what the function door adds to the weight and bias"
    close("the merged output", logits(model, case.batch()), before, 1e-10, advice)


@needs("attaches")
@on_every_model
def adapters_are_independent(subject: Subject, case: Case) -> None:
    """Two adapters side by side do not influence each other"""
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


@needs("attaches")
@on_every_model
def copies(subject: Subject, case: Case) -> None:
    """A deep copy and a state-dict round trip give the same output, and a copy shares nothing"""
    model = subject.trained(case)
    before, twin = logits(model, case.batch()), copy.deepcopy(model)
    close("a deep copy's output", logits(twin, case.batch()), before, 0.0, "hold no reference to tensors outside the module")
    if wrong := silent(twin, train(twin, case.batch())):
        raise Failed(f"in a deep copy {wrong}; hold no reference to tensors outside the module, closures included")
    close("the output after a deep copy was trained", logits(model, case.batch()), before, 0.0, "hold no reference to tensors outside the module")
    torch.manual_seed(4321)
    other = subject.attached(case)
    other.load_state_dict(model.state_dict())
    advice = "make what is drawn a parameter or a persistent buffer"
    close("the output after a state-dict round trip", logits(other, case.batch()), before, 0.0, advice)


CHECKS: tuple[Check, ...] = (
    declares_itself, attaches, starts_as_identity, base_is_frozen, everything_learns, learns_under_checkpointing, learns_in_reversible_blocks,
    runs_in_half_precision, keys_are_kept, saves_and_loads, finishes, detaches, merges, adapters_are_independent, serves_rows, copies,
)  # fmt: skip
