"""A reference that the checked file cannot edit: an entry of the registry, an instructor's class, or a dense function.

It is read before the checked file runs, and both are given the same inputs and the same parameters.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from effzoo.attention.core import QKV, AttentionCore, Context, Mask
from effzoo.checks.runner import Failed, needs
from effzoo.checks.subject import Subject, draw, given, same_as
from effzoo.errors import OptionError, UnknownNameError, listing
from effzoo.registry import attention, load_file, peft, scope
from effzoo.sites import KeysValues
from effzoo.spec import Spec, parse_one

VIEWS = {"attention": attention, "peft": peft}
ALIASES = {"rank": ("r",), "alpha": ("lora_alpha",), "dropout": ("p",), "window": ("w",)}
KEYWORDS = ("valid", "causal", "is_global", "memory")  # what a dense function of attention may ask for
BASES = ("effzoo.attention.core", "effzoo.attention.predicate", "effzoo.sites", "effzoo.peft.method",
         "effzoo.peft.training_hooks")  # fmt: skip
DRAWS = 8


@dataclass
class Reference:
    """What the checked entry must equal.

    kind: "attention" or "peft".
    text: as it was given.
    spec: its options; of a function none.
    cls: the class, or None for a function.
    function: attention, dense(q, k, v, *, ...) -> out with the keywords `KEYWORDS` that it names; PEFT,
        dense(x, weight, bias, *, ...) -> y' with the names of trained tensors and options.
    seed: of what is drawn.
    """

    kind: str
    text: str
    spec: Spec
    cls: Any = None
    function: Callable[..., Any] | None = None
    seed: int = 0

    def like(self, context: Context) -> Any:
        """The reference of attention in a layer."""
        if self.function is not None:
            return Written(self.function, context)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            made: AttentionCore = self.cls(context, **self.spec.options)
        return made.double().eval()

    def options_for(self, spec: Spec) -> Spec:
        """A spec of the checked entry, with the options of the reference that it has too and that were not given."""
        had = [option.name for option in VIEWS[self.kind].options(spec.name)]
        options = dict(spec.options)
        for name, value in self.spec.options.items():
            own = next((one for one in (name, *ALIASES.get(name, ())) if one in had), None)
            if own is not None:
                options.setdefault(own, value)
        return Spec(spec.name, options)


class Written:
    """A dense function of attention, as a core: softmax(q k^T / sqrt(d)) v, or what else it says, in float64."""

    projections = QKV

    def __init__(self, function: Callable[..., Tensor], context: Context):
        self.function, self.context = function, context
        self.asks = [name for name in KEYWORDS if name in inspect.signature(function).parameters]

    def dense(self, *projected: Tensor, mask: Mask, memory: KeysValues | None = None) -> Tensor:
        batch, _, n, _ = projected[0].shape
        valid = torch.ones(batch, n, dtype=torch.bool) if mask.valid is None else mask.valid
        facts = {"valid": valid, "causal": self.context.causal, "is_global": mask.is_global, "memory": memory}
        return self.function(*projected[:3], **{name: facts[name] for name in self.asks})

    def pattern(self, n: int, mask: Mask) -> Tensor:
        """The keys of which a query takes values: one-hot values give the weights back."""
        shape = (1, self.context.heads, n, self.context.head_dim)
        q, k = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        eye = torch.eye(n, dtype=torch.float64).expand(1, shape[1], n, n)
        return self.dense(q, k, eye, mask=mask) != 0

    def uses(self, mask: Mask) -> tuple[str, ...]:
        return tuple(QKV)

    def state_dict(self) -> dict[str, Tensor]:
        return {}


def read(text: str, kinds: Iterable[str] = VIEWS, seed: int = 0) -> Reference:
    """The reference that a text names: a spec such as "longformer[window=8]", a file that registers one entry, or
    FILE.py:FUNCTION.

    Raises UnknownNameError for a name that is not registered, OptionError for a file without a reference.
    """
    path, _, function = text.partition(":")
    if not path.endswith(".py"):
        spec = parse_one(text)
        for kind in kinds:
            names = {name for first in VIEWS[kind].names() for name in (first, *VIEWS[kind].aliases(first))}
            if spec.name in names:
                return _entry(kind, text, text, seed)
        raise UnknownNameError("reference", spec.name, sorted({n for kind in kinds for n in VIEWS[kind].names()}))
    with scope():
        entered = load_file(path)
        module = next(m for m in list(sys.modules.values()) if _is_of(m, path))
        found = vars(module).get(function or "dense")
        if inspect.isfunction(found):
            first = next(iter(inspect.signature(found).parameters), "")
            return Reference("peft" if first == "x" else "attention", text, Spec("dense"), None, found, seed)
        if len(entered) == 1 and not function and entered[0][0] in VIEWS:
            kind, name = entered[0]
            return _entry(kind, text, name, seed)
    raise OptionError(
        f"--against {text}: the file has no function {function or 'dense'!r} and registers "
        f"{listing(name for _, name in entered) if entered else 'nothing'}; write dense(q, k, v, *, valid, causal) for "
        "attention or dense(x, weight, bias, *, ...) for a method, or register one entry"
    )


def _entry(kind: str, text: str, given: str, seed: int) -> Reference:
    """An entry of the registry, with the small options that are checked."""
    from effzoo.checks.peft import Subject as Tuned

    subject = Subject.of(given) if kind == "attention" else Tuned.of(given)
    return Reference(kind, text, subject.spec, subject.cls, seed=seed)


def _is_of(module: Any, path: str) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and module.__name__.startswith("effzoo_file_") and Path(file) == Path(path).absolute()


@needs("every_length", "is_no_known_slip")
def equals_reference(subject: Subject) -> None:
    """Output and gradients equal the reference's, on drawn lengths, widths, heads, paddings and global tokens

    Build both with one context, give both the q, k, v that `effzoo.checks.subject.draw` makes, and compare at the index
    of the reason, which is (batch, head, query, dimension).
    """
    reference = subject.reference
    if reference.cls is not None and subject.cls.not_causal and not reference.cls.not_causal:
        raise Failed(
            f"the kind says that it cannot be causal, and {reference.text} can; build the triangle where "
            "self.context.causal"
        )
    drawn = torch.Generator().manual_seed(1000 + reference.seed)
    bidirectional_only = subject.cls.not_causal or (reference.cls is not None and reference.cls.not_causal)
    for causal in (False,) if bidirectional_only else (False, True):
        for number in range(DRAWS):
            _one_draw(subject, causal, number, drawn)


def _one_draw(subject: Subject, causal: bool, number: int, drawn: torch.Generator) -> None:
    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=drawn))]

    n, batch = one_of(*range(1, 50)), one_of(1, 2, 3)
    core = subject.core(causal=causal, heads=one_of(1, 2, 3), width=one_of(4, 6, 8), max_length=64)
    theirs = subject.reference.like(core.context)
    share(theirs.state_dict(), core)
    valid = torch.rand(batch, n, generator=drawn) < 0.8 if number % 3 else None
    if valid is not None and number % 2:  # behind the tokens, as a tokenizer pads
        valid = torch.arange(n) < torch.randint(1, n + 1, (batch, 1), generator=drawn)
    is_global = None
    if number % 4 == 3 and core.knows_globals() and hasattr(theirs, "knows_globals") and theirs.knows_globals():
        is_global = (torch.rand(batch, n, generator=drawn) < 0.2) & (torch.ones(()).bool() if valid is None else valid)
    mask, memory = Mask(valid, is_global), None
    takes = "memory" in getattr(theirs, "asks", ()) or (subject.reference.cls is not None and theirs.takes_memory())
    if number % 2 and takes and core.takes_memory():
        keys, values = torch.randn(
            2, core.context.heads, 3, core.context.head_dim, dtype=torch.float64, generator=drawn
        )
        memory = keys.requires_grad_(), values.requires_grad_()
    inputs = draw(core, n, mask, batch=batch, seed=number + 100 * subject.reference.seed)
    by_name = dict(zip(core.projections, inputs, strict=True))
    if set(theirs.uses(mask)) != {name for name, x in by_name.items() if x is not None}:
        raise Failed(
            f"forward takes {listing(core.uses(mask))} where {subject.reference.text} takes "
            f"{listing(theirs.uses(mask))}; declare the same projections"
        )
    out = core(*inputs, **given(mask, memory))
    wanted = [by_name.get(name) for name in theirs.projections]
    has_dense = isinstance(theirs, Written) or Subject(subject.reference.spec, subject.reference.cls).has_definition
    compute = theirs.dense if has_dense else theirs
    expected = compute(*wanted, mask=mask, **({} if memory is None else {"memory": memory}))
    said = [*(["padding"] if valid is not None else []), *(["global tokens"] if is_global is not None else [])]
    said += ["memory"] if memory is not None else []
    what = f" with {' and '.join(said)}" if said else ""
    side, sizes = "causal" if causal else "bidirectional", f"{core.context.heads} heads of {core.context.head_dim}"
    where = f"{side}{what}, {sizes}"
    advice = f"compare with what {subject.reference.text} computes there, line by line of its formula"
    same_as(out, expected, core, inputs, f"{where}, n = {n}", advice, memory)


def share(theirs: Mapping[str, Tensor], core: AttentionCore) -> None:
    """Give a core the parameters of the reference, by their names or else by their shapes, in order."""
    own, left = dict(core.state_dict()), dict(theirs)
    if len(own) != len(left):
        raise Failed(
            f"the kind has {len(own)} tensors {listing(own)}, the reference {len(left)} {listing(left)}; hold what the "
            "formula names as parameters and buffers, and nothing else"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            fits = name if name in left else next((n for n, x in left.items() if x.shape == tensor.shape), None)
            if fits is None or left[fits].shape != tensor.shape:
                raise Failed(
                    f"the reference has no tensor of the shape {tuple(tensor.shape)} of {name}, but "
                    f"{listing(f'{n} {tuple(x.shape)}' for n, x in left.items())}; store them as the formula does"
                )
            tensor.copy_(left.pop(fits))


# --- own work


@needs("every_length")
def is_own_work(subject: Subject) -> None:
    """The kind is written out: it derives from no registered kind and calls none, nor a dense definition

    Print `type(core).__mro__`, and search the file for imports from effzoo.attention.
    """
    derives(subject.cls.__mro__, subject.reference)
    others = [cls for name in attention.names() if (cls := attention.get(name)) is not subject.cls]
    files = {inspect.getsourcefile(cls) for cls in others if cls.__module__.startswith("effzoo.")}
    for _, core in subject.cores():
        with calls(files, subject.reference) as called:
            core(*draw(core, 16, Mask()), mask=Mask())
        refuse(called)


def derives(mro: Iterable[type], reference: Reference | None) -> None:
    """Fail for a class that derives from one of effzoo that computes something, or from the reference."""
    for number, parent in enumerate(mro):
        of_effzoo = parent.__module__.startswith("effzoo.") and not parent.__module__.startswith(BASES)
        if of_effzoo or (reference is not None and parent is reference.cls):
            how = "is" if number == 0 else "derives from"
            raise Failed(
                f"it {how} {parent.__name__} of {parent.__module__}, which computes what was to be written; derive "
                "from AttentionCore, or from Method and PeftModule, and write it out"
            )


@contextmanager
def calls(files: Iterable[str | None], reference: Reference | None) -> Iterator[set[str]]:
    """Inside the block, collects the functions of these files, of the reference and of effzoo's dense definition that
    are called; "?" where the file took the observer away."""
    from effzoo.attention import reference as definition

    code = {definition.dense.__code__}
    if reference is not None and reference.function is not None:
        code.add(reference.function.__code__)
    called: set[str] = set()
    watched = set(files) - {None}

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and (frame.f_code in code or frame.f_code.co_filename in watched):
            called.add(f"{frame.f_code.co_qualname} of {Path(frame.f_code.co_filename).name}")

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        yield called
    finally:
        if sys.getprofile() is not watch:
            called.add("?")
        sys.setprofile(before)


def refuse(called: set[str]) -> None:
    if "?" in called:
        raise Failed("the file turned off the observer of its calls (sys.setprofile); leave it on")
    if called:
        raise Failed(f"it calls {sorted(called)[0]}, which computes what was to be written; write it out")
