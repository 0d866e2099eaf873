"""A drawn sequence of every operation on adapters, several methods at once: what must hold after each step, and at the
end.

Beside the model goes an account in plain Python of who is attached, who acts, in which order, at which scale, how
combined, who learns and what is merged. It is kept from what the test did and what is documented of it, and never read
from the model. After each step the model says the same as the account, and computes, bit for bit, what a fresh base
computes on which nothing was ever done and only those hang that should act: so an operation on one adapter never moves
an output in which it takes no part. Adapters have drawn weights, so each of them changes the output. A refused
operation changes nothing. At the end everything is unmerged and detached, and the base is there again, bit for bit.

A machine begins with several adapters and is short; many of its rules are a few operations in a row which, drawn one by
one, would seldom meet, such as to let several act together, merge one, change who acts, and unmerge. Such a rule counts
as one step, and everything is looked at after each part.

`EFFZOO_STEPS=10000 python -m pytest tests/test_state_machine.py -s` takes about so many steps instead of 1000, and says
    how many operations of each kind; EFFZOO_SEED=1 draws others.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import pickle
import tempfile
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import effzoo
from effzoo.errors import EffzooError
from effzoo.peft import state as states
from effzoo.peft.attach import adapter_tensors, base_tensors
from effzoo.peft.state import HERE, adapters_of
from effzoo.sites import Activity, Roster, sites

STEPS = int(os.environ.get("EFFZOO_STEPS", "1000"))
LONG = 8  # drawn steps of a machine; about as many are done when it begins
SPECS = [
    "lora[rank=2, dropout=0.3]", "ia3", "prefix[length=2]", "prompt[length=2]", "houlsby[bottleneck=2]", "bitfit",
    "dora[rank=1]", "head",
    "full[targets=mlp.*]", "adamix[bottleneck=2]", "lora[targets=all-linear, rank=1]|norms",
    "routed[of='lora[rank=1]', experts=2]", "diff[targets=attn.q]",
    "llama_adapter[length=2]", "fusion[of='pfeiffer[bottleneck=2]', experts=2]",
]  # fmt: skip
BROKEN = [
    "lora|lora",
    "ia3[targets=nope]",
    "lora|routed[of='prompt', experts=2]",
    "houlsby|lora[init=pissa, rank=99]",
    "nope",
    "adamix|ladder[factor=0]",
]
MERGEABLE = [
    "lora[rank=2]", "ia3", "bitfit", "diff[targets=attn.q]", "lora[targets=all-linear, rank=1]|norms", "dora[rank=1]",
    "lora[targets=('embed.token', 'attn.v'), rank=1]",
]  # fmt: skip
FINISHED = ("adamix", "diff")  # what finishing changes, if only by rounding
CAN_BE_FINISHED = (*FINISHED, "prefix", "fusion")
NAMES = st.sampled_from("abcde")
ORDER = st.permutations("abcde")
PICK = st.integers(0, 11)  # one of those that can be meant, or now and then any name
SCALE = st.sampled_from([1.0, 0.5, -2.0])
SCALES = st.sampled_from([1.0, 1.0, 1.0, 0.5, -2.0, 0.0, float("nan")])
TOGETHER = st.sampled_from(["stack", "average", "rows"])
MERGING = st.tuples(
    ORDER, TOGETHER, SCALE, st.booleans(), PICK, st.sampled_from(MERGEABLE),
    st.sampled_from(["", "detach", "detach", "activate", "together", "attach", "merge", "mode", "train", "gone",
    "out of order"]),
)  # fmt: skip
DETACHING = st.tuples(
    ORDER, st.sampled_from([0, 1, 1, 2, 3]), st.sampled_from(["stack", "average", "rows", "rows"]), SCALE
)
HALTED = st.tuples(PICK, st.sampled_from(SPECS), st.integers(0, 14), st.integers(0, 14))
REFUSED = st.tuples(st.sampled_from(BROKEN), st.integers(0, 99), NAMES, NAMES)
CONTEXT = st.tuples(
    ORDER, st.integers(0, 2), st.booleans(), SCALE, st.booleans(), PICK, st.sampled_from(MERGEABLE),
    st.sampled_from(["", "", "detach", "attach", "activate", "together", "merge", "unmerge", "finish", "train", "off",
    "on", "gone"]),
)  # fmt: skip
IDS = torch.randint(2, 20, (4, 5), generator=torch.Generator().manual_seed(1))
counts: collections.Counter[str] = collections.Counter()


def drawn(**strategies):
    """A rule whose runs are counted."""

    def counted(operation):
        @functools.wraps(operation)
        def run(*arguments, **keywords):
            counts[operation.__name__] += 1
            return operation(*arguments, **keywords)

        return rule(**strategies)(run)

    return counted


@functools.cache
def base():
    torch.manual_seed(0)
    sizes = {
        "dim": 8,
        "layers": 2,
        "heads": 2,
        "mlp": 12,
        "vocab": 20,
        "max_length": 16,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    model = effzoo.build("bert", task="token_classification", **sizes).double().eval()
    model.embeddings.token_type.requires_grad_(False)  # what was frozen stays so
    return model


def digest(tensors):
    """Of names, dtypes and bits."""
    found = hashlib.blake2b(digest_size=12)
    for key, x in tensors.items():
        found.update(
            f"{key} {x.dtype} {tuple(x.shape)}".encode()
            + x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


def whole(model):
    """Everything that a refused operation might have changed."""
    state = adapters_of(model)
    return {
        "status": str(effzoo.status(model)),
        "activity": state.roster.now,
        "attached": [
            (name, each.spec, each.finished, {k: list(v) for k, v in each.places.items()})
            for name, each in state.attachments.items()
        ],
        "merged": [(record.name, digest({f"{k}": x for k, x in record.originals.items()})) for record in state.merged],
        "frozen": sorted(state.frozen),
        "tensors": digest(model.state_dict()),
        "flags": [(key, p.requires_grad) for key, p in model.named_parameters()],
        "modes": [(key, module.training, type(module)) for key, module in model.named_modules()],
        "random": digest({"": torch.get_rng_state()}),
    }


@dataclasses.dataclass(frozen=True)
class Acts:
    """Who acts at which scale, in this order; "stack", "average" or "rows"; the adapter of each row; who learns."""

    scales: tuple[tuple[str, float], ...] = ()
    how: str = "stack"
    rows: tuple[str | None, ...] | None = None
    trained: frozenset[str] = frozenset()

    @property
    def names(self):
        return tuple(name for name, _ in self.scales)

    def without(self, name):
        """Nothing else changes, but one is no mean, and where nobody is left no row is chosen for."""
        left = tuple(each for each in self.scales if each[0] != name)
        rows = None if self.rows is None or not left else tuple(None if row == name else row for row in self.rows)
        how = "stack" if not left or (self.how == "average" and len(left) == 1) else self.how
        return Acts(left, how, rows, self.trained - {name})


class Own(Activity):
    """What the account tells a fresh model, which so reads no scale but those of the account."""

    def scale(self, name):
        return dict(zip(self.names, self.scales, strict=True)).get(name, 1.0)


def alone(name, scale=1.0):
    return Acts(((name, scale),), trained=frozenset({name}))


@dataclasses.dataclass
class Out:
    """A merged adapter: what it held, its place among the attached, who acted before and after."""

    name: str
    content: tuple[str, str]
    place: int
    before: Acts
    after: Acts


def hung(model, name):
    """What hangs under a name, by path."""
    return {path: site.adapters[name] for path, site in sites(model) if name in site.adapters}


def bits_of(parts):
    return digest({f"{path}.{key}": x for path, part in sorted(parts.items()) for key, x in part.state_dict().items()})


def bare(model):
    """A copy without any adapter."""
    return stripped(copy.deepcopy(model))


def stripped(model):
    """The model itself, with all adapters taken off by hand."""
    vars(model).pop(HERE, None)
    for _, site in sites(model):
        site.adapters.clear()
        vars(site).pop("roster", None)
    return model


def inputs(model, rows):
    """Tokens of the smallest vocabulary, and the last one that the model has."""
    ids = (IDS if rows is None else IDS[: len(rows)]).clone()
    ids[:, 0] = model.config.vocab - 1
    return ids


def logits(model, rows):
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return model.eval()(input_ids=inputs(model, rows)).logits
    except EffzooError:
        return None  # what acts cannot act together
    finally:
        for module, mode in training.items():
            module.training = mode


class Halt(BaseException):
    """Ctrl-C, say."""


class Adapters(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.epoch, self.drawn = copy.deepcopy(base()), 0, 0
        self.bases = [bare(self.model)]  # the base, and what each merge has made of it
        self.attached, self.merged, self.acts = {}, [], Acts()  # the content of each adapter, by its bits
        self.specs, self.parts, self.outputs = {}, {}, {}  # of each adapter; of each content; of each base and activity
        self.done, self.around = set(), contextlib.nullcontext  # the finished; in what operations are run

    # the account

    def expected(self, acts):
        """What a fresh model computes on which only these hang; torch's own product rounds in another way where a
        weight is trained."""
        told = [(self.attached[name], scale) for name, scale in acts.scales]
        numbers = (
            None if acts.rows is None else tuple(-1 if row is None else acts.names.index(row) for row in acts.rows)
        )
        learn, frozen = tuple(name in acts.trained for name in acts.names), bool(self.attached)
        key = (digest(self.bases[-1].state_dict()), self.epoch, tuple(told), acts.how, numbers, learn, frozen)
        if key not in self.outputs:
            model = self.bases[-1]
            by_path = dict(sites(model))
            roster = Roster(Own(acts.names, tuple(scale for _, scale in acts.scales), acts.how == "average", numbers))
            for site in by_path.values():
                site.roster = roster
            flags = [(p, p.requires_grad) for p in model.parameters()]
            for p, flag in flags:
                p.requires_grad_(flag and not frozen)
            for name, (content, _), trained in zip(acts.names, told, learn, strict=True):
                for path, part in copy.deepcopy(self.parts[content]).items():
                    by_path[path].adapters[name] = part.requires_grad_(trained)
            self.outputs[key] = logits(model, acts.rows)
            stripped(model)
            for p, flag in flags:
                p.requires_grad_(flag)
        return self.outputs[key]

    def holds(self, name, how="drawn"):
        """Take down what an adapter holds now, and how it came to it."""
        parts = hung(self.model, name)
        found = (bits_of(parts), how)
        if found not in self.parts:
            self.parts[found] = copy.deepcopy(parts)
        self.attached[name] = found

    def is_new(self, name, spec):
        """An adapter came to be, and acts alone."""
        assert self.free(name)
        self.attached[name], self.specs[name] = "", str(spec)
        self.done.discard(name)
        self.acts = alone(name)
        self.shaken(name)

    def shaken(self, name):
        """Give an adapter tensors of its own."""
        self.drawn += 1
        draw = torch.Generator().manual_seed(self.drawn)
        with torch.no_grad():
            for x in adapter_tensors(self.model, name).values():
                if x.is_floating_point():
                    x.add_(0.1 * torch.randn(x.shape, generator=draw, dtype=x.dtype))
        self.holds(name)

    def free(self, name):
        return name not in self.attached and all(out.name != name for out in self.merged)

    def one(self, pick, among, name):
        """Mostly one that can be meant."""
        among = sorted(among)
        return among[pick % len(among)] if among and pick < 11 else name

    def tried(self, operation, *, must=False, must_not=False, may=EffzooError):
        """Whether an operation succeeded; if not, nothing has changed."""
        before = whole(self.model)
        try:
            with self.around():
                operation()
        except may as error:
            assert not must, f"refused, and should not be: {error}"
            after = whole(self.model)
            changed = [part for part in before if before[part] != after[part]]
            assert not changed, f"{type(error).__name__} ({error}) has changed {changed}"
            counts["refused"] += 1
            return False
        assert not must_not, "done, and should be refused"
        return True

    # operations

    @initialize(
        specs=st.lists(st.sampled_from(MERGEABLE), min_size=3, max_size=3), other=st.sampled_from(SPECS),
        four=st.booleans(),
        merged=MERGING, left=DETACHING, context=CONTEXT, halted=HALTED, refused=REFUSED,
        order=st.permutations(range(5)),
    )  # fmt: skip
    def begin(self, specs, other, four, merged, left, context, halted, refused, order):
        """Several adapters, and what every machine is to see at least once."""
        for name, spec in zip("abcd", [*specs, other] if four else specs, strict=False):
            effzoo.attach(self.model, spec, name=name)
            self.is_new(name, spec)
        self.each_leaves_in_turn()
        parts = (
            lambda: self.merge_and_unmerge(merged), lambda: self.detach_one_of_several(left),
            lambda: self.inside_a_context(context),
            lambda: self.halted_at_the_end(halted), lambda: self.what_is_refused(refused),
        )  # fmt: skip
        for number in order:
            if self.attached:
                parts[number]()
                self.all_holds()

    def each_leaves_in_turn(self):
        """Of copies in which all act by row, averaged and stacked, each time at scales of their own and with the first
        one frozen."""
        names = tuple(self.attached)
        for how, leaving in itertools.product(("rows", "average", "stack"), names):
            model, rows = copy.deepcopy(self.model), (names[1], None, names[0], names[2]) if how == "rows" else None
            acting = tuple(dict.fromkeys(row for row in rows if row)) if rows else names
            scales = {name: (0.5, -2.0, 0.25, 1.0)[number] for number, name in enumerate(acting)}
            chosen = {"rows": rows} if rows else {"combine": how}
            effzoo.activate(model, *(() if rows else acting), **chosen, scale=scales, train=acting[1:])
            effzoo.detach(model, leaving)
            counts["left in turn"] += 1
            acts = Acts(tuple(scales.items()), how, rows, frozenset(acting[1:])).without(leaving)
            said = effzoo.status(model)
            assert (tuple(said.scales.items()), said.combine, said.rows) == (acts.scales, acts.how, acts.rows), (
                f"{leaving} left, and {said} is left, not {acts}"
            )
            learn = {
                key.split(".adapters.")[1].split(".")[0]
                for key, p in model.named_parameters()
                if p.requires_grad and ".adapters." in key
            }
            trained = adapters_of(model).roster.now.trained
            assert learn == acts.trained == trained == set(said.trainable), (
                f"{leaving} left, and {learn} learn, {set(trained)} are to, not {set(acts.trained)}"
            )

    def without_any_one_the_rest_goes_on(self):
        """What would be left without each of those that act or learn, which is what detaching and merging leave."""
        now = self.state.roster.now
        for name in {*self.acts.names, *self.acts.trained}:
            left, acts = now.without(name), self.acts.without(name)
            found = (
                left.names,
                tuple(zip(left.names, left.scales, strict=True)),
                left.combine,
                left.by_row(),
                left.trained,
            )
            assert found == (acts.names, acts.scales, acts.how, acts.rows, acts.trained), (
                f"without {name}: {left}, and should be {acts}"
            )

    def all_holds(self):
        self.each_holds_what_it_held()
        self.without_any_one_the_rest_goes_on()
        self.always()

    @precondition(lambda self: len(self.attached) < 5)
    @drawn(pick=PICK, name=NAMES, spec=st.sampled_from(SPECS))
    def attach(self, pick, name, spec):
        name = self.one(pick, [each for each in "abcde" if self.free(each)], name)
        if self.tried(
            lambda: effzoo.attach(self.model, spec, name=name), must=self.free(name), must_not=not self.free(name)
        ):
            self.is_new(name, spec)

    @drawn(drawing=HALTED)
    def halted_at_the_end(self, drawing):
        """An operation that is stopped when all of it is done leaves nothing of it."""
        pick, spec, one, two = drawing
        name = sorted(self.attached)[pick % len(self.attached)] if self.attached else "a"
        with tempfile.TemporaryDirectory() as folder:
            if self.attached:
                effzoo.save_adapter(self.model, folder, name=name)
                self.shaken(name)
            self.halted(folder, name, spec, one, two)

    def halted(self, folder, name, spec, *numbers):
        operations = [
            lambda model: effzoo.attach(model, spec, name="f"),
            lambda model: effzoo.activate(model, name, scale=0.5),
            lambda model: effzoo.activate(model, *self.attached, combine="average", train=()),
            lambda model: effzoo.detach(model, name),
            lambda model: effzoo.merge(model, name),
            lambda model: effzoo.unmerge(model, self.merged[-1].name if self.merged else name),
            lambda model: effzoo.peft.finish(model, *self.attached),
            lambda model: effzoo.combine(model, {name: 0.5}, name="f", head=name),
            lambda model: effzoo.peft.gather(model, self.attached, name="f"),
            lambda model: effzoo.quantise(model, 8),
            lambda model: effzoo.dequantise(model),
            lambda model: effzoo.resize_vocabulary(model, model.config.vocab + 1),
            lambda model: effzoo.peft.recast(model, name, dtype="float32"),
            lambda model: effzoo.load_adapter(model, folder, name="f"),
            lambda model: effzoo.peft.swap_weights(model, folder, name=name),
        ]
        for operation in (operations[number] for number in numbers):
            with torch.random.fork_rng(), mock.patch.object(states, "_check_synchronised") as ends:
                try:
                    operation(copy.deepcopy(self.model))
                except EffzooError:
                    continue
            if ends.call_count:
                counts["halted"] += 1
                with mock.patch.object(
                    states, "_check_synchronised", side_effect=[*[None] * (ends.call_count - 1), Halt]
                ):
                    assert not self.tried(lambda operation=operation: operation(self.model), must_not=True, may=Halt)

    @drawn(drawing=REFUSED)
    def what_is_refused(self, drawing):
        """Some operations that cannot succeed, whatever the state is."""
        spec, which, name, other = drawing
        model, known = self.model, list(self.attached)[:2]
        with tempfile.TemporaryDirectory() as folder:
            refused = [
                lambda: effzoo.attach(model, spec, name="f"),
                lambda: effzoo.activate(model, *known, "f"),
                lambda: effzoo.activate(model, *known, scale={"f": 2.0}),
                lambda: effzoo.activate(model, *known, combine="sum"),
                lambda: effzoo.activate(model, *known, train=[*known, "f"]),
                lambda: effzoo.activate(model, rows=[*known, "f"]),
                lambda: effzoo.active(model, "f").__enter__(),
                lambda: effzoo.detach(model, "f"),
                lambda: effzoo.unmerge(model, "f"),
                lambda: effzoo.load_adapter(model, folder, name="f"),
                lambda: effzoo.peft.swap_weights(model, folder, name=name),
                lambda: effzoo.combine(model, dict.fromkeys([*known, "f"], 0.5), name="g", head="f"),
                lambda: effzoo.peft.gather(model, [*known, *known], name="g"),
                lambda: effzoo.peft.gather(model, self.attached, name=(known or "?")[0]),
                lambda: effzoo.peft.recast(model, *known, dtype="int8"),
                lambda: effzoo.quantise(model, 3),
                lambda: effzoo.swap_attention(model, "nope"),
                lambda: effzoo.resize_vocabulary(model, 9),
            ]
            for number in (which, which + 7, which + 14):
                self.tried(refused[number % len(refused)], must_not=True)
            self.tried(lambda: effzoo.attach(model, spec, name="f"), must_not=True)
            for out in self.merged:
                self.tried(lambda out=out: effzoo.attach(model, "lora", name=out.name), must_not=True)
            if name in self.attached:
                self.tried(lambda: effzoo.attach(model, "lora", name=name), must_not=True)
                self.tried(lambda: effzoo.activate(model, name, other, name), must_not=True)
            if self.attached:
                self.tried(lambda: effzoo.swap_attention(model, "full"), must_not=True)

    @drawn(pick=PICK, name=NAMES)
    def detach(self, pick, name):
        name = self.one(pick, self.attached, name)
        known = name in self.attached
        if self.tried(lambda: effzoo.detach(self.model, name), must=known, must_not=not known):
            del self.attached[name], self.specs[name]
            self.done.discard(name)
            self.acts = self.acts.without(name)

    @drawn(
        names=ORDER, wrong=st.integers(0, 9), most=st.sampled_from([0, 1, 2, 3, 3, 4]), scale=SCALES, other=SCALES,
        combine=st.sampled_from(["stack", "average"]), number=st.integers(0, 4),
    )  # fmt: skip
    def activate(self, names, wrong, most, combine, scale, other, number):
        names = [name for name in names if name in self.attached or wrong == 0][:most] + (["a"] if wrong == 1 else [])
        train, scales = names[:number], dict(zip(names, [scale, other], strict=False))
        known = len(set(names)) == len(names) and set(names) <= set(self.attached)
        finite = all(x == x for x in scales.values())
        plain = known and all(x == 1 for x in scales.values())
        if self.tried(
            lambda: effzoo.activate(self.model, *names, combine=combine, scale=scales, train=train),
            must=plain,
            must_not=not known or not finite,
        ):
            how = "average" if combine == "average" and len(names) > 1 else "stack"
            self.acts = Acts(tuple((name, scales.get(name, 1.0)) for name in names), how, trained=frozenset(train))

    @drawn(rows=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=4), wrong=st.integers(0, 5))
    def by_row(self, rows, wrong):
        rows = [row if row in self.attached or wrong == 0 else None for row in rows]
        known = all(row is None or row in self.attached for row in rows)
        if self.tried(lambda: effzoo.activate(self.model, rows=rows), must=known, must_not=not known):
            names = tuple(dict.fromkeys(row for row in rows if row is not None))
            self.acts = (
                Acts(tuple((name, 1.0) for name in names), "rows", tuple(rows), frozenset(names)) if names else Acts()
            )

    def together(self, names, how, scale, most=3):
        """Let several act: one after the other, the first at a scale, or averaged, or by row; now and then the first
        one alone learns."""
        names = [name for name in names if name in self.attached][:most]
        if how == "rows":
            self.by_row([None, *names, *names[:1]] if len(names) < 3 else [names[1], names[2], names[0], names[2]], 1)
        else:
            self.activate(names, 9, most, how, scale, 1.0, 1 if scale == 0.5 else 9)

    @drawn(pick=PICK, name=NAMES)
    def merge(self, pick, name):
        name = self.one(pick, self.attached, name)
        acts, acted = self.acts, name in self.acts.names
        if self.tried(
            lambda: effzoo.merge(self.model, name),
            must_not=name not in self.attached or (acted and acts.how != "stack"),
        ):
            counts["merged"] += 1
            alike = self.expected(alone(name, dict(acts.scales).get(name, 1.0)))
            before = self.expected(acts) if acted else None
            place, after = list(self.attached).index(name), acts.without(name)
            self.merged.append(Out(name, self.attached.pop(name), place, acts, after))
            self.acts = after
            self.bases.append(bare(self.model))
            for (_, p), q in zip(self.bases[-1].named_parameters(), self.bases[0].parameters(), strict=True):
                p.requires_grad_(q.requires_grad)
            assert torch.allclose(logits(self.bases[-1], None), alike, rtol=0, atol=1e-8), (
                "the merged base computes what the adapter did"
            )
            assert before is None or torch.allclose(logits(self.model, None), before, rtol=0, atol=1e-8), (
                "merging goes on as before"
            )

    @drawn(pick=PICK, name=NAMES)
    def unmerge(self, pick, name):
        name = self.one(pick, [out.name for out in self.merged[-1:]], name)
        last = bool(self.merged) and self.merged[-1].name == name
        if self.tried(lambda: effzoo.unmerge(self.model, name), must=last, must_not=not last):
            counts["unmerged"] += 1
            out = self.merged.pop()
            self.bases.pop()
            order = list(self.attached.items())
            order.insert(out.place, (name, out.content))
            self.attached = dict(order)
            if self.acts == out.after:
                self.acts = out.before
            elif name in out.before.names and self.acts.how == "stack":
                own = tuple(each for each in out.before.scales if each[0] == name)
                self.acts = Acts(own + self.acts.scales, trained=self.acts.trained | (out.before.trained & {name}))

    @precondition(lambda self: self.attached)
    @drawn(drawing=MERGING)
    def merge_and_unmerge(self, drawing):
        """What is merged comes back to where it was, or fits in with what was done since."""
        names, how, scale, acting, other, spec, then = drawing
        names, depth = [name for name in names if name in self.attached], len(self.merged)
        stack = how == "stack" and acting
        self.together(names if stack else names[1:], how, scale, 3 if stack else 2)
        self.merge_one(names[0])
        self.always()
        if then == "detach":
            self.detach(other, names[-1])
        elif then == "gone":
            for name in list(self.attached):
                self.detach(11, name)
        elif then == "activate":
            self.together(names[1:2], "stack", scale)
        elif then == "together":
            self.together(reversed(names), "average" if acting else "stack", scale)
        elif then == "attach":
            self.attach(other, names[0], spec)
        elif then == "merge":
            self.merge_one(names[-1])
        elif then == "mode":
            self.mode(not self.model.training, False)
        elif then == "train":
            self.train(0.1)
        elif then == "out of order":
            self.merge_one(names[-1])
            self.unmerge(11, names[0])
        self.always()
        while len(self.merged) > depth:
            self.unmerge(0, "")
            self.always()

    def merge_one(self, name):
        self.merge(11, name)

    @precondition(lambda self: self.merged)
    @drawn(entry=st.integers(0, 999))
    def write_into_what_is_merged(self, entry):
        """Unmerging would lose it, and is refused until it is put back."""
        out, keys = self.merged[-1], effzoo.peft.merging.merged_tensors(self.model)
        tensors = [x for key, x in self.model.state_dict().items() if key in keys[out.name]]
        if tensors and all(x.is_floating_point() for x in tensors):
            tensor = tensors[entry % len(tensors)].view(-1)
            was = tensor[entry % len(tensor)].clone()
            tensor[entry % len(tensor)] += 1
            self.tried(lambda: effzoo.unmerge(self.model, out.name), must_not=True)
            tensor[entry % len(tensor)] = was

    @precondition(lambda self: self.attached)
    @drawn(drawing=DETACHING)
    def detach_one_of_several(self, drawing):
        """What goes on without it is averaged, or chosen by row, as before."""
        names, which, how, scale = drawing
        names = [name for name in names if name in self.attached]
        self.together(names, how, scale)
        self.always()
        self.detach(11, names[which % len(names)])

    def always(self):
        counts["steps"] += 1
        self.status_is_true()
        self.the_model_computes_what_a_fresh_one_does()

    @drawn(drawing=CONTEXT)
    def inside_a_context(self, drawing):
        names, most, off, scale, fails, pick, spec, then = drawing
        inner = [name for name in names if name in self.attached]

        def inside():
            if then == "detach":
                self.detach(pick, names[-1])
            elif then == "attach":
                self.attach(pick, names[-1], spec)
            elif then == "activate":
                self.together(inner[-1:], "stack", scale)
            elif then == "together":
                self.together(inner, "average" if fails else "rows", 1.0)
            elif then == "merge":
                self.merge(pick, names[-1])
            elif then == "unmerge":
                self.unmerge(pick, names[-1])
            elif then == "finish":
                self.finish(pick, names[-1])
            elif then == "train":
                self.train(0.1)
            elif then in ("off", "on"):
                self.context(inner[1:3], then == "off", 1.0, fails, self.always)
            elif then == "gone":
                for name in list(self.attached):
                    self.detach(11, name)
            self.always()

        self.context(inner[:most], off, scale, fails, inside)

    def context(self, names, off, scale, fails, inside):
        """What acts behind it is as before, without those that are gone, and those that came since are inactive."""
        acts, before, entered = self.acts, whole(self.model), False
        context = (
            effzoo.disabled(self.model)
            if off
            else effzoo.active(self.model, *names, scale=dict.fromkeys(names[:1], scale))
        )
        counts["contexts"] += 1
        try:
            with context:
                entered = True
                among = tuple((name, scale if name == names[0] else 1.0) for name in names)
                self.acts = Acts(trained=acts.trained) if off else Acts(among, trained=frozenset(names))
                self.always()
                within, trained = whole(self.model), dict(self.attached)
                inside()
                nothing = whole(self.model) == within and trained == self.attached
                if fails:
                    raise KeyError
        except KeyError:
            pass
        except EffzooError:
            if entered:
                raise
            nothing = True
        for name in {*acts.names, *acts.trained} - self.attached.keys():
            acts = acts.without(name)
        self.acts = acts
        assert not nothing or whole(self.model) == before

    @drawn(pick=PICK, name=NAMES)
    def finish(self, pick, name):
        name = self.one(pick, self.attached, name)
        known, before = name in self.attached, logits(self.model, self.acts.rows)
        if self.tried(lambda: effzoo.peft.finish(self.model, name), must=known, must_not=not known):
            counts["finished"] += name not in self.done
            self.finished(name)
            after = logits(self.model, self.acts.rows)
            assert before is None or torch.allclose(before, after, rtol=0, atol=1e-8)

    def finished(self, name):
        """What finishing rounds is another content. A mixture is made of finished adapters: nothing is left to do."""
        gathered = self.specs[name].startswith(("routed ", "fusion "))
        if not gathered and any(word in self.specs[name] for word in CAN_BE_FINISHED):
            self.done.add(name)
        if any(word in self.specs[name] for word in FINISHED):
            self.drawn += 1
            self.holds(name, f"finished {self.drawn}")

    @precondition(lambda self: self.attached)
    @drawn(pick=PICK, name=NAMES, other=NAMES, finish=st.booleans())
    def save_and_load(self, pick, name, other, finish):
        name = self.one(pick, self.attached, name)
        other = self.one(pick, [each for each in "abcde" if self.free(each)], other)
        if name not in self.attached:
            return
        if finish:
            self.finish(11, name)
        with tempfile.TemporaryDirectory() as folder:
            assert self.tried(lambda: effzoo.save_adapter(self.model, folder, name=name), must=True)
            free = self.free(other)
            if self.tried(lambda: effzoo.load_adapter(self.model, folder, name=other), must=free, must_not=not free):
                counts["loaded"] += 1
                self.attached[other], self.specs[other], self.acts = self.attached[name], self.specs[name], alone(other)
                self.done |= {other} if name in self.done else set()

    @precondition(lambda self: self.attached)
    @drawn(pick=PICK, name=NAMES, other=NAMES, alike=st.booleans())
    def swap_weights(self, pick, name, other, alike):
        """The weights of an adapter as they were before it moved, or those of another one."""
        name, other = self.one(pick, self.attached, name), self.one((pick + 1) % 11, self.attached, other)
        other = name if alike else other
        if name not in self.attached or other not in self.attached:
            return
        ids, attached = {key: id(x) for key, x in self.model.named_parameters()}, self.attached[name]
        held = self.state.attachments
        alike = held[name].spec == held[other].spec and held[name].finished == held[other].finished
        with tempfile.TemporaryDirectory() as folder:
            effzoo.save_adapter(self.model, folder, name=name)
            if name == other:
                self.shaken(name)
            fits = held[name].spec == held[other].spec
            if self.tried(
                lambda: effzoo.peft.swap_weights(self.model, folder, name=other), must=alike, must_not=not fits
            ):
                counts["swapped"] += 1
                self.attached[other] = attached
                self.done |= {other} if name in self.done else set()
                assert not alike or ids == {key: id(x) for key, x in self.model.named_parameters()}

    @drawn(pick=PICK, name=NAMES, one=PICK, weight=st.sampled_from([0.5, 1.0, -1.0]))
    def combine(self, pick, name, one, weight):
        name = self.one(pick, [each for each in "abcde" if self.free(each)], name)
        among = sorted(self.attached) or ["a"]
        one, two = among[one % len(among)], among[(one + 1) % len(among)]
        weights = {one: weight, two: 0.25}
        if self.tried(lambda: effzoo.combine(self.model, weights, name=name, head=one), must_not=not self.free(name)):
            counts["combined"] += 1
            found = effzoo.peft.delta(self.model, name)
            parts = [effzoo.peft.delta(self.model, each) for each in weights]
            for key in found:
                if key.startswith("head."):
                    assert torch.equal(found[key], parts[0].get(key, torch.zeros_like(found[key])))
                else:
                    total = sum(w * part[key] for w, part in zip(weights.values(), parts, strict=True) if key in part)
                    assert torch.allclose(found[key], total + torch.zeros_like(found[key]), rtol=0, atol=1e-10)
            self.is_new(name, "combined")

    @drawn(pick=PICK, name=NAMES, one=PICK, how=st.sampled_from(["fusion", "routed"]))
    def gather(self, pick, name, one, how):
        name = self.one(pick, [each for each in "abcde" if self.free(each)], name)
        among = sorted(self.attached) or ["a", "b"]
        one, two = among[one % len(among)], among[(one + 1) % len(among)]
        if self.tried(
            lambda: effzoo.peft.gather(self.model, [one, two], name=name, how=how, head=one),
            must_not=not self.free(name),
        ):
            counts["gathered"] += 1
            self.finished(one), self.finished(two)
            self.is_new(name, f"{how} {self.specs[one]} {self.specs[two]}")

    @precondition(lambda self: any(word in spec for spec in self.specs.values() for word in ("routed", "fusion")))
    @drawn(pick=PICK, name=NAMES, other=NAMES)
    def extract(self, pick, name, other):
        name = self.one(pick, [each for each in "abcde" if self.free(each)], name)
        mixture = self.one(
            pick,
            [each for each in self.attached if "routed" in self.specs[each] or "fusion" in self.specs[each]],
            other,
        )
        if self.tried(
            lambda: effzoo.peft.extract(self.model, mixture, 1, name=name),
            must_not=not self.free(name) or mixture not in self.attached,
        ):
            counts["extracted"] += 1
            self.is_new(name, f"extracted {self.specs[mixture]}")

    @property
    def state(self):
        return adapters_of(self.model)

    @drawn(training=st.booleans(), part=st.booleans())
    def mode(self, training, part):
        (self.model.blocks[0].mlp if part else self.model).train(training)

    @drawn(how=st.sampled_from([contextlib.nullcontext, contextlib.nullcontext, torch.no_grad, torch.inference_mode]))
    def surround(self, how):
        """In what the operations are run from now on."""
        self.around = how

    @drawn(how=st.sampled_from(["deepcopy", "pickle", "save"]))
    def go_on_with_a_copy(self, how):
        before, old = whole(self.model), self.model
        if how == "deepcopy":
            self.model = copy.deepcopy(old)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(old))
        else:
            file = io.BytesIO()
            torch.save(old, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)
        assert whole(self.model) == before
        for name in effzoo.attached(old):  # what happens to the old one is nothing to the copy
            effzoo.detach(old, name)
        assert whole(self.model) == before

    @drawn(bits=st.sampled_from([8, 4]))
    def quantise(self, bits):
        self.another_base(lambda model: effzoo.quantise(model, bits))

    @drawn()
    def dequantise(self):
        self.another_base(effzoo.dequantise)

    @drawn(attention=st.sampled_from(["full", "longformer[window=2]", "lsh[chunk=4]", "nope"]))
    def swap_attention(self, attention):
        def change(model):
            with torch.random.fork_rng():  # a refusal is to leave the generators alone
                torch.manual_seed(self.epoch)
                effzoo.swap_attention(model, attention)

        self.another_base(change)

    def another_base(self, change):
        touched = any(
            any(".attn." in path or ".mlp." in path for path in record.modules) for record in self.state.merged
        )
        before = digest(base_tensors(self.model))
        if self.tried(lambda: change(self.model)):
            assert not touched or digest(base_tensors(self.model)) == before, (
                "what is merged cannot be taken out any more"
            )
            for each in self.bases:  # the same is made of a base on which nothing hangs
                change(each)
                own = dict(self.model.named_parameters())
                for key, p in each.named_parameters():  # what a new parameter learns is the operation's own choice
                    p.requires_grad_(own[key].requires_grad or key in self.state.frozen)
            self.epoch += 1

    @drawn(more=st.integers(0, 2))
    def resize_vocabulary(self, more):
        """More tokens: what the old ones make of the model stays, bit for bit."""
        ids = IDS if self.acts.rows is None else IDS[: len(self.acts.rows)]
        n, model = self.model.config.vocab + more, self.model.eval()

        def out():
            try:
                with torch.no_grad():
                    return model(input_ids=ids).logits
            except EffzooError:
                return None

        before = out()
        touched = any(
            "embed.token" in path or "embeddings.token" in path
            for record in self.state.merged
            for path in record.modules
        )
        if self.tried(lambda: effzoo.resize_vocabulary(model, n), must_not=bool(more and touched)):
            counts["resized"] += more > 0
            after = out()
            assert (before is None and after is None) or torch.equal(before, after)
            for each in self.bases:
                effzoo.resize_vocabulary(each, n)
            for name in self.attached if more else ():
                self.holds(name, f"resized {n} {self.attached[name]}")

    @precondition(lambda self: self.acts.trained)
    @drawn(rate=st.sampled_from([0.0, 0.1]))
    def train(self, rate):
        """Only what is trained and acts gets a gradient; nothing else is changed by the step."""
        if not self.acts.trained:
            return
        before = whole(self.model)
        try:
            rows = self.acts.rows
            out = self.model(input_ids=inputs(self.model, rows))
            if out.logits.requires_grad:
                out.logits.square().sum().backward()
        except EffzooError:
            pass
        for key, p in self.model.named_parameters():
            if p.grad is not None:
                assert ".adapters." in key and key.split(".adapters.")[1].split(".")[0] in self.acts.trained & set(
                    self.acts.names
                )
                with torch.no_grad():
                    p -= rate * p.grad.clamp(-1, 1)
            p.grad = None
        after = whole(self.model)
        changed = ("random", "tensors") if rate else ("random",)
        assert all(before[part] == after[part] for part in before if part not in changed)
        for name in self.acts.trained & set(self.acts.names) if rate else ():
            self.holds(name, self.attached[name][1])

    # what always holds

    def the_model_computes_what_a_fresh_one_does(self):
        out, expected = logits(self.model, self.acts.rows), self.expected(self.acts)
        assert (out is None) == (expected is None), (
            f"{self.acts} can act: {out is not None}, and on a fresh model: {expected is not None}"
        )
        assert out is None or torch.equal(out, expected), (
            f"{self.acts}: another output than of a fresh model, by {(out - expected).abs().max():.1e}"
        )
        counts["computed" if out is not None else "cannot act together"] += 1

    @invariant()
    def all_holds_after_a_step(self):
        self.all_holds()

    def status_is_true(self):
        said, acts = effzoo.status(self.model), self.acts
        assert tuple(said.attached) == tuple(self.attached) and tuple(said.merged) == tuple(
            out.name for out in self.merged
        )
        assert said.active == acts.names and tuple(said.scales.items()) == acts.scales, (
            f"{said.scales} act, and should: {acts.scales}"
        )
        assert (said.combine, said.rows) == (acts.how, acts.rows), (
            f"{said.combine} {said.rows}, and should be {acts.how} {acts.rows}"
        )
        flags = {key: p.requires_grad for key, p in self.model.named_parameters()}
        trained = {
            key.split(".adapters.")[1].split(".")[0] for key, flag in flags.items() if flag and ".adapters." in key
        }
        assert trained == set(said.trainable) == acts.trained, (
            f"{trained} learn, {said.trainable} are said to, {set(acts.trained)} should"
        )
        assert sum(row.trainable_tensors for row in said.tensors) == sum(flags.values())
        assert set(said.finished) == self.done & set(self.attached), (
            f"{said.finished} are finished, and should: {self.done}"
        )
        assert (said.frozen > 0) == bool(self.attached), f"{said.frozen} parameters of the base are said to be frozen"

    def each_holds_what_it_held(self):
        hanging = {key.split(".adapters.")[1].split(".")[0] for key in self.model.state_dict() if ".adapters." in key}
        assert hanging == set(self.attached), f"{hanging} hang, and should: {set(self.attached)}"
        for name, content in self.attached.items():
            assert bits_of(hung(self.model, name)) == content[0], (
                f"{name} ({self.specs[name]}) holds other tensors than before"
            )
        assert digest(base_tensors(self.model)) == digest(base_tensors(self.bases[-1])), "the base is another"
        flags = {key: p.requires_grad for key, p in self.model.named_parameters() if ".adapters." not in key}
        at_first = {key: p.requires_grad for key, p in self.bases[-1].named_parameters()}
        should = dict.fromkeys(flags, False) if self.attached else at_first
        assert flags == should, (
            f"of the base learn {[key for key in flags if flags[key] != should[key]]}, or not, and should not"
        )

    def teardown(self):
        for out in reversed(self.merged):
            effzoo.unmerge(self.model, out.name)
        for name in list(effzoo.attached(self.model)):
            effzoo.detach(self.model, name)
        assert digest(base_tensors(self.model)) == digest(self.model.state_dict()) == digest(self.bases[0].state_dict())
        assert [p.requires_grad for p in self.model.parameters()] == [
            p.requires_grad for p in self.bases[0].parameters()
        ]
        counts["machines"] += 1


if "EFFZOO_SEED" in os.environ:
    seed(int(os.environ["EFFZOO_SEED"]))(Adapters)


def settings_of(steps):
    return settings(
        max_examples=max(1, steps // (2 * LONG)), stateful_step_count=LONG, deadline=None,
        derandomize="EFFZOO_SEED" not in os.environ, database=None,
        suppress_health_check=list(HealthCheck), print_blob=False,
    )  # fmt: skip


class TestFewSteps(Adapters.TestCase):
    settings = settings_of(100)


@pytest.mark.slow
class TestAdapters(Adapters.TestCase):
    settings = settings_of(STEPS)

    def runTest(self):
        super().runTest()
        print(dict(counts))
