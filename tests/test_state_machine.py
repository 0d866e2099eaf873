"""A drawn sequence of every operation on adapters, several methods at once: what must hold after each step, and at the end.

Beside the model goes an account in plain Python of who is attached, who acts, in which order, at which scale, how combined, who learns and what is
merged. It is kept from what the test did and what is documented of it, and never read from the model. After each step the model says the same as the
account, and computes, bit for bit, what a fresh base computes on which nothing was ever done and only those hang that should act: so an operation on
one adapter never moves an output in which it takes no part. Adapters have drawn weights, so each of them changes the output. A refused operation
changes nothing. At the end everything is unmerged and detached, and the base is there again, bit for bit.

`EFFZOO_STEPS=10000 python -m pytest tests/test_state_machine.py -s` takes so many steps instead of 800, and says how many of each kind.
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import io
import os
import pickle
import tempfile

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import effzoo
from effzoo.errors import EffzooError
from effzoo.peft.attach import adapter_tensors, base_tensors
from effzoo.peft.state import HERE, adapters_of
from effzoo.sites import Activity, Roster, sites

STEPS = int(os.environ.get("EFFZOO_STEPS", "800"))
LONG = min(40, STEPS)
SPECS = [
    "lora[rank=2, dropout=0.3]", "ia3", "prefix[length=2]", "prompt[length=2]", "houlsby[bottleneck=2]", "bitfit", "dora[rank=1]", "head",
    "full[targets=mlp.*]", "adamix[bottleneck=2]", "lora[targets=all-linear, rank=1]|norms", "routed[of='lora[rank=1]', experts=2]",
    "diff[targets=attn.q]",
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
MERGEABLE = ["lora[rank=2]", "ia3", "bitfit", "diff[targets=attn.q]", "lora[targets=all-linear, rank=1]|norms", "dora[rank=1]"]
FINISHED = ("adamix", "diff")  # what finishing changes, if only by rounding
NAMES = st.sampled_from("abcd")
PICK = st.integers(0, 7)  # one of those that can be meant, or now and then any name
SCALES = st.sampled_from([1.0, 1.0, 1.0, 0.5, -2.0, 0.0, float("nan")])
IDS = torch.randint(2, 20, (3, 5), generator=torch.Generator().manual_seed(1))
counts: collections.Counter[str] = collections.Counter()


@functools.cache
def base():
    torch.manual_seed(0)
    sizes = {"dim": 8, "layers": 2, "heads": 2, "mlp": 12, "vocab": 20, "max_length": 16, "dropout": 0.0, "attention_dropout": 0.0}
    model = effzoo.build("bert", task="token_classification", **sizes).double().eval()
    model.embeddings.token_type.requires_grad_(False)  # what was frozen stays so
    return model


def digest(tensors):
    """Of names, dtypes and bits."""
    found = hashlib.blake2b(digest_size=12)
    for key, x in tensors.items():
        found.update(f"{key} {x.dtype} {tuple(x.shape)}".encode() + x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def whole(model):
    """Everything that a refused operation might have changed."""
    state = adapters_of(model)
    return {
        "status": str(effzoo.status(model)),
        "activity": state.roster.now,
        "attached": [(name, each.spec, each.finished, {k: list(v) for k, v in each.places.items()}) for name, each in state.attachments.items()],
        "merged": [(record.name, digest({f"{k}": x for k, x in record.originals.items()})) for record in state.merged],
        "frozen": sorted(state.frozen),
        "tensors": digest(model.state_dict()),
        "flags": [(key, p.requires_grad) for key, p in model.named_parameters()],
        "modes": [(key, module.training, type(module)) for key, module in model.named_modules()],
        "told": [len(own) for module in model.modules() if isinstance(own := vars(module).get("told"), list)],
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
    """What hangs under a name, by path, and who in the model speaks to it."""
    found = {path: site.adapters[name] for path, site in sites(model) if name in site.adapters}
    return found, {path: list(part.told) for path, part in model.named_modules() if isinstance(vars(part).get("told"), list)}


def bits_of(parts):
    return digest({f"{path}.{key}": x for path, part in sorted(parts.items()) for key, x in part.state_dict().items()})


def bare(model):
    """A copy without any adapter, taken off by hand."""
    model = copy.deepcopy(model)
    vars(model).pop(HERE, None)
    for _, site in sites(model):
        site.adapters.clear()
        vars(site).pop("roster", None)
    for part in model.modules():
        if isinstance(vars(part).get("told"), list):
            part.told.clear()
    return model


def logits(model, rows):
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return model.eval()(input_ids=IDS if rows is None else IDS[: len(rows)]).logits
    except EffzooError:
        return None  # what acts cannot act together
    finally:
        for module, mode in training.items():
            module.training = mode


class Adapters(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.epoch, self.drawn = copy.deepcopy(base()), 0, 0
        self.bases = [bare(self.model)]  # the base, and what each merge has made of it
        self.attached, self.merged, self.acts = {}, [], Acts()  # the content of each adapter, by its bits
        self.specs, self.parts, self.outputs = {}, {}, {}  # of each adapter; of each content; of each base and activity

    # the account

    def expected(self, acts):
        """What a fresh model computes on which only these hang."""
        told = [(self.attached[name], scale) for name, scale in acts.scales]
        numbers = None if acts.rows is None else tuple(-1 if row is None else acts.names.index(row) for row in acts.rows)
        key = (digest(self.bases[-1].state_dict()), self.epoch, tuple(told), acts.how, numbers)
        if key not in self.outputs:
            model = copy.deepcopy(self.bases[-1])
            by_path, everything = dict(sites(model)), dict(model.named_modules())
            for name, content in zip(acts.names, (content for content, _ in told), strict=True):
                parts, speakers = copy.deepcopy(self.parts[content])
                for path, part in parts.items():
                    by_path[path].adapters[name] = part
                for path, heard in speakers.items():
                    everything[path].told.extend(heard)
            roster = Roster(Own(acts.names, tuple(scale for _, scale in acts.scales), acts.how == "average", numbers))
            for site in by_path.values():
                site.roster = roster
            self.outputs[key] = logits(model, acts.rows)
        return self.outputs[key]

    def holds(self, name, how="drawn"):
        """Take down what an adapter holds now, and how it came to it."""
        parts = hung(self.model, name)
        found = (bits_of(parts[0]), how)
        self.parts.setdefault(found, copy.deepcopy(parts))
        self.attached[name] = found

    def is_new(self, name, spec):
        """An adapter came to be, and acts alone."""
        assert self.free(name)
        self.attached[name], self.specs[name] = "", str(spec)
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
        return among[pick % len(among)] if among and pick < 7 else name

    def tried(self, operation, *, must=False, must_not=False, may=EffzooError):
        """Whether an operation succeeded; if not, nothing has changed."""
        before = whole(self.model)
        try:
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

    @initialize(specs=st.lists(st.sampled_from(MERGEABLE), min_size=3, max_size=3), other=st.sampled_from(SPECS), four=st.booleans())
    def begin(self, specs, other, four):
        for name, spec in zip("abcd", [*specs, other] if four else specs, strict=False):
            effzoo.attach(self.model, spec, name=name)
            self.is_new(name, spec)

    @rule(pick=PICK, name=NAMES, spec=st.sampled_from(SPECS))
    def attach(self, pick, name, spec):
        name = self.one(pick, [each for each in "abcd" if self.free(each)], name)
        if self.tried(lambda: effzoo.attach(self.model, spec, name=name), must=self.free(name), must_not=not self.free(name)):
            self.is_new(name, spec)

    @rule(spec=st.sampled_from(BROKEN))
    def attach_what_is_broken(self, spec):
        self.tried(lambda: effzoo.attach(self.model, spec, name="e"), must_not=True)

    @rule(pick=PICK, name=NAMES)
    def detach(self, pick, name):
        name = self.one(pick, self.attached, name)
        known = name in self.attached
        if self.tried(lambda: effzoo.detach(self.model, name), must=known, must_not=not known):
            del self.attached[name], self.specs[name]
            self.acts = self.acts.without(name)

    @rule(
        names=st.permutations("abcd"), wrong=st.integers(0, 9), most=st.sampled_from([0, 1, 2, 3, 3, 4]), scale=SCALES, other=SCALES,
        combine=st.sampled_from(["stack", "average"]), number=st.integers(0, 4),
    )  # fmt: skip
    def activate(self, names, wrong, most, combine, scale, other, number):
        names = [name for name in names if name in self.attached or wrong == 0][:most] + (["a"] if wrong == 1 else [])
        train, scales = names[:number], dict(zip(names, [scale, other], strict=False))
        known = len(set(names)) == len(names) and set(names) <= set(self.attached)
        finite = all(x == x for x in scales.values())
        plain = known and all(x == 1 for x in scales.values())
        if self.tried(
            lambda: effzoo.activate(self.model, *names, combine=combine, scale=scales, train=train), must=plain, must_not=not known or not finite
        ):
            how = "average" if combine == "average" and len(names) > 1 else "stack"
            self.acts = Acts(tuple((name, scales.get(name, 1.0)) for name in names), how, trained=frozenset(train))

    @rule(rows=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=3), wrong=st.integers(0, 5))
    def by_row(self, rows, wrong):
        rows = [row if row in self.attached or wrong == 0 else None for row in rows]
        known = all(row is None or row in self.attached for row in rows)
        if self.tried(lambda: effzoo.activate(self.model, rows=rows), must=known, must_not=not known):
            names = tuple(dict.fromkeys(row for row in rows if row is not None))
            self.acts = Acts(tuple((name, 1.0) for name in names), "rows", tuple(rows), frozenset(names)) if names else Acts()

    @rule(pick=PICK, name=NAMES)
    def merge(self, pick, name):
        name = self.one(pick, self.attached, name)
        acted, mixed = name in self.acts.names, self.acts.how != "stack"
        if self.tried(lambda: effzoo.merge(self.model, name), must_not=name not in self.attached or (acted and mixed)):
            counts["merged"] += 1
            before = self.expected(self.acts if acted else Acts(((name, 1.0),))) if acted or not self.acts.names else None
            assert before is None or torch.allclose(logits(self.model, None), before, rtol=0, atol=1e-8)
            place, after = list(self.attached).index(name), self.acts.without(name)
            self.merged.append(Out(name, self.attached.pop(name), place, self.acts, after))
            self.acts = after
            self.bases.append(bare(self.model))
            for (_, p), q in zip(self.bases[-1].named_parameters(), self.bases[0].parameters(), strict=True):
                p.requires_grad_(q.requires_grad)

    @rule(pick=PICK, name=NAMES)
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
            self.finished(name)
            if self.acts == out.after:
                self.acts = out.before
            elif name in out.before.names and self.acts.how == "stack":
                own = tuple(each for each in out.before.scales if each[0] == name)
                self.acts = Acts(own + self.acts.scales, trained=self.acts.trained | (out.before.trained & {name}))

    @precondition(lambda self: self.attached)
    @rule(pick=PICK, names=st.permutations("abcd"), scale=st.sampled_from([1.0, 0.5]), other=NAMES, then=st.sampled_from(["", "detach", "activate"]))
    def merge_and_unmerge(self, pick, names, scale, other, then):
        """What is seldom drawn in a row."""
        names = [name for name in names if name in self.attached]
        if self.tried(lambda: effzoo.activate(self.model, *names, scale={names[-1]: scale}), must=scale == 1):
            self.acts = Acts(tuple((name, scale if name == names[-1] else 1.0) for name in names), trained=frozenset(names))
        depth = len(self.merged)
        self.merge(pick, names[0])
        self.always()
        if then == "detach":
            self.detach(7, other)
        elif then == "activate" and other in self.attached:
            effzoo.activate(self.model, other)
            self.acts = alone(other)
        if len(self.merged) > depth:
            self.unmerge(0, "")

    @rule(names=st.permutations("abcd"), which=st.integers(0, 3), rows=st.booleans(), scale=st.sampled_from([1.0, 0.5]))
    def detach_one_of_several(self, names, which, rows, scale):
        """What goes on without it is averaged, or chosen by row, as before."""
        names = [name for name in names if name in self.attached]
        if rows:
            self.by_row(names[:3] or [None], 1)
        else:
            self.activate(names, 9, 4, "average", 1.0, scale, 4)
        self.always()
        if names:
            self.detach(7, names[which % len(names)])

    def always(self):
        self.status_is_true()
        self.the_model_computes_what_a_fresh_one_does()

    @rule(pick=PICK, name=NAMES, two=st.booleans(), fails=st.booleans(), off=st.booleans(), scale=st.sampled_from([1.0, 0.5]))
    def inside_a_context(self, pick, name, two, fails, off, scale):
        before, acts = whole(self.model), self.acts
        names = sorted({self.one(pick, self.attached, name), *(list(self.attached)[:1] if two else [])})
        context = effzoo.disabled(self.model) if off else effzoo.active(self.model, *names, scale={names[0]: scale})
        try:
            with context:
                inside = tuple((each, scale if each == names[0] else 1.0) for each in names)
                self.acts = Acts(trained=acts.trained) if off else Acts(inside, trained=frozenset(names))
                self.always()
                if fails:
                    raise KeyError
        except (KeyError, EffzooError):
            pass
        finally:
            self.acts = acts
        assert whole(self.model) == before

    @rule(pick=PICK, name=NAMES)
    def finish(self, pick, name):
        name = self.one(pick, self.attached, name)
        known, before = name in self.attached, logits(self.model, self.acts.rows)
        if self.tried(lambda: effzoo.peft.finish(self.model, name), must=known, must_not=not known):
            self.finished(name)
            after = logits(self.model, self.acts.rows)
            assert before is None or torch.allclose(before, after, rtol=0, atol=1e-8)

    def finished(self, name):
        """What finishing rounds is another content."""
        if any(word in self.specs[name] for word in FINISHED):
            self.drawn += 1
            self.holds(name, f"finished {self.drawn}")

    @rule(pick=PICK, name=NAMES, other=NAMES)
    def save_and_load(self, pick, name, other):
        name = self.one(pick, self.attached, name)
        with tempfile.TemporaryDirectory() as folder:
            if name not in self.attached or self.merged:
                return
            assert self.tried(lambda: effzoo.save_adapter(self.model, folder, name=name), must=True)
            free = self.free(other)
            if self.tried(lambda: effzoo.load_adapter(self.model, folder, name=other), must=free, must_not=not free):
                self.attached[other], self.specs[other], self.acts = self.attached[name], self.specs[name], alone(other)

    @rule(pick=PICK, name=NAMES, other=NAMES)
    def swap_weights(self, pick, name, other):
        name, other = self.one(pick, self.attached, name), self.one((pick + 1) % 8, self.attached, other)
        if name not in self.attached or other not in self.attached or self.merged:
            return
        before = {key: id(x) for key, x in self.model.named_parameters()}
        attached = self.state.attachments
        alike = attached[name].spec == attached[other].spec and attached[name].finished == attached[other].finished
        with tempfile.TemporaryDirectory() as folder:
            effzoo.save_adapter(self.model, folder, name=name)
            if self.tried(lambda: effzoo.peft.swap_weights(self.model, folder, name=other), must=alike):
                self.attached[other] = self.attached[name]
                assert not alike or before == {key: id(x) for key, x in self.model.named_parameters()}

    @rule(name=NAMES, one=NAMES, two=NAMES)
    def combine(self, name, one, two):
        if self.tried(lambda: effzoo.combine(self.model, {one: 0.5, two: 0.25}, name=name, head=one), must_not=not self.free(name)):
            self.is_new(name, "combined")

    @rule(name=NAMES, one=NAMES, two=NAMES, how=st.sampled_from(["fusion", "routed"]))
    def gather(self, name, one, two, how):
        if self.tried(lambda: effzoo.peft.gather(self.model, [one, two], name=name, how=how, head=one), must_not=not self.free(name)):
            self.finished(one), self.finished(two)
            self.is_new(name, f"{how} {self.specs[one]} {self.specs[two]}")

    @rule(name=NAMES, mixture=NAMES)
    def extract(self, name, mixture):
        if self.tried(lambda: effzoo.peft.extract(self.model, mixture, 1, name=name), must_not=not self.free(name)):
            self.is_new(name, self.specs[mixture])

    @property
    def state(self):
        return adapters_of(self.model)

    @rule(training=st.booleans(), part=st.booleans())
    def mode(self, training, part):
        (self.model.blocks[0].mlp if part else self.model).train(training)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "save"]))
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

    @rule(bits=st.sampled_from([8, 4]))
    def quantise(self, bits):
        self.another_base(lambda model: effzoo.quantise(model, bits))

    @rule()
    def dequantise(self):
        self.another_base(effzoo.dequantise)

    @rule(attention=st.sampled_from(["full", "longformer[window=2]", "lsh[chunk=4]", "nope"]))
    def swap_attention(self, attention):
        def change(model):
            with torch.random.fork_rng():  # a refusal is to leave the generators alone
                torch.manual_seed(self.epoch)
                effzoo.swap_attention(model, attention)

        self.another_base(change)

    def another_base(self, change):
        touched = any(any(".attn." in path or ".mlp." in path for path in record.modules) for record in self.state.merged)
        before = digest(base_tensors(self.model))
        if self.tried(lambda: change(self.model)):
            assert not touched or digest(base_tensors(self.model)) == before, "what is merged cannot be taken out any more"
            for each in self.bases:  # the same is made of a base on which nothing hangs
                change(each)
                own = dict(self.model.named_parameters())
                for key, p in each.named_parameters():  # what a new parameter learns is the operation's own choice
                    p.requires_grad_(own[key].requires_grad or key in self.state.frozen)
            self.epoch += 1

    @precondition(lambda self: self.acts.trained)
    @rule()
    def a_pass_backward(self):
        """Only what is trained and acts gets a gradient; nothing is changed."""
        before = whole(self.model)
        try:
            rows = self.acts.rows
            out = self.model(input_ids=IDS if rows is None else IDS[: len(rows)])
            if out.logits.requires_grad:
                out.logits.square().sum().backward()
        except EffzooError:
            pass
        for key, p in self.model.named_parameters():
            if p.grad is not None:
                assert ".adapters." in key and key.split(".adapters.")[1].split(".")[0] in self.acts.trained & set(self.acts.names)
            p.grad = None
        after = whole(self.model)
        assert {**before, "random": 0} == {**after, "random": 0}

    # what always holds

    @invariant()
    def the_model_computes_what_a_fresh_one_does(self):
        out, expected = logits(self.model, self.acts.rows), self.expected(self.acts)
        assert (out is None) == (expected is None), f"{self.acts} can act: {out is not None}, and on a fresh model: {expected is not None}"
        assert out is None or torch.equal(out, expected), f"{self.acts}: another output than of a fresh model, by {(out - expected).abs().max():.1e}"
        counts["computed" if out is not None else "cannot act together"] += 1

    @invariant()
    def status_is_true(self):
        said, acts = effzoo.status(self.model), self.acts
        assert tuple(said.attached) == tuple(self.attached) and tuple(said.merged) == tuple(out.name for out in self.merged)
        assert said.active == acts.names and tuple(said.scales.items()) == acts.scales, f"{said.scales} act, and should: {acts.scales}"
        assert (said.combine, said.rows) == (acts.how, acts.rows), f"{said.combine} {said.rows}, and should be {acts.how} {acts.rows}"
        flags = {key: p.requires_grad for key, p in self.model.named_parameters()}
        trained = {key.split(".adapters.")[1].split(".")[0] for key, flag in flags.items() if flag and ".adapters." in key}
        assert trained == set(said.trainable) == acts.trained, f"{trained} learn, {said.trainable} are said to, {set(acts.trained)} should"
        assert sum(row.trainable_tensors for row in said.tensors) == sum(flags.values())

    @invariant()
    def each_holds_what_it_held(self):
        hanging = {key.split(".adapters.")[1].split(".")[0] for key in self.model.state_dict() if ".adapters." in key}
        assert hanging == set(self.attached), f"{hanging} hang, and should: {set(self.attached)}"
        for name, content in self.attached.items():
            assert bits_of(hung(self.model, name)[0]) == content[0], f"{name} ({self.specs[name]}) holds other tensors than before"
        assert digest(base_tensors(self.model)) == digest(base_tensors(self.bases[-1])), "the base is another"
        flags = {key: p.requires_grad for key, p in self.model.named_parameters() if ".adapters." not in key}
        at_first = {key: p.requires_grad for key, p in self.bases[-1].named_parameters()}
        should = dict.fromkeys(flags, False) if self.attached else at_first
        assert flags == should, f"of the base learn {[key for key in flags if flags[key] != should[key]]}, or not, and should not"
        counts["steps"] += 1

    def teardown(self):
        for out in reversed(self.merged):
            effzoo.unmerge(self.model, out.name)
        for name in list(effzoo.attached(self.model)):
            effzoo.detach(self.model, name)
        assert digest(base_tensors(self.model)) == digest(self.model.state_dict()) == digest(self.bases[0].state_dict())
        assert [p.requires_grad for p in self.model.parameters()] == [p.requires_grad for p in self.bases[0].parameters()]
        assert not self.model.told and not any(block.told for block in self.model.blocks)
        counts["machines"] += 1


Adapters.TestCase.settings = settings(
    max_examples=max(1, STEPS * 6 // (5 * LONG)), stateful_step_count=LONG, deadline=None, derandomize="EFFZOO_SEED" not in os.environ, database=None,
    suppress_health_check=list(HealthCheck), print_blob=False,
)  # fmt: skip


class TestAdapters(Adapters.TestCase):
    def runTest(self):
        super().runTest()
        print(dict(counts))
