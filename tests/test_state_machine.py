"""A drawn sequence of every operation on adapters, several methods at once: what must hold after each step, and at the end.

The state of a model says what it computes: whatever way led there, the same base, merged adapters and activity give the same output, bit for bit. So
an operation on one adapter never moves an output in which it takes no part. A refused operation changes nothing, and `status` is true. At the end
everything is unmerged and detached, and the base is there again, bit for bit.

`EFFZOO_STEPS=10000 python -m pytest tests/test_state_machine.py -s` takes so many steps instead of some hundred, and says how many of each kind.
"""

import collections
import copy
import functools
import hashlib
import io
import os
import pickle
import tempfile

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import effzoo
from effzoo.errors import EffzooError
from effzoo.peft.attach import adapter_tensors, base_tensors
from effzoo.peft.state import adapters_of

STEPS = int(os.environ.get("EFFZOO_STEPS", "250"))
LONG = min(50, STEPS)
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
NAMES = st.sampled_from("abcd")
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


class Adapters(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.epoch, self.drawn = copy.deepcopy(base()), 0, 0
        self.contents, self.outputs = {}, {}  # which tensors an adapter has, by a number; what was computed in each state
        self.flags = [p.requires_grad for p in self.model.parameters()]
        self.expected_base = digest(base_tensors(self.model))

    # what is known of the state, and what follows from it

    @property
    def state(self):
        return adapters_of(self.model)

    def output(self):
        training = {module: module.training for module in self.model.modules()}
        try:
            with torch.no_grad():
                return self.model.eval()(input_ids=IDS if self.state.roster.now.rows is None else IDS[: len(self.state.roster.now.rows)]).logits
        finally:
            for module, mode in training.items():
                module.training = mode

    def content(self, name):
        return self.contents[name]

    def key(self):
        now = self.state.roster.now
        return (
            self.epoch,
            tuple((record.name, self.content(record.name), record.before.scale(record.name)) for record in self.state.merged) + tuple(self.fixed()),
            tuple((name, self.content(name)) for name in now.names), now.scales, now.average, now.rows,
        )  # fmt: skip

    def fixed(self):
        return ()

    def tried(self, operation, *, must=False, may=EffzooError):
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
        return True

    def shaken(self, name):
        """Give an adapter tensors of its own."""
        self.drawn += 1
        draw = torch.Generator().manual_seed(self.drawn)
        with torch.no_grad():
            for x in adapter_tensors(self.model, name).values():
                if x.is_floating_point():
                    x.add_(0.1 * torch.randn(x.shape, generator=draw, dtype=x.dtype))
        self.contents[name] = self.drawn

    def acts(self):
        """Who acts, in which order, at which scale, how combined, on which rows, and who learns: as status says it."""
        said = effzoo.status(self.model)
        return {"scales": list(said.scales.items()), "combine": said.combine, "rows": said.rows, "trained": sorted(said.trainable)}

    def others(self, name):
        """The same without one of them: nothing else changes, but one is no mean, and no row is left without names."""
        acts = self.acts()
        left = [each for each in acts["scales"] if each[0] != name]
        rows = None if acts["rows"] is None or not left else tuple(None if row == name else row for row in acts["rows"])
        single = acts["combine"] == "average" and len(left) < 2
        combine = "stack" if single or (acts["rows"] is not None and rows is None) else acts["combine"]
        return {"scales": left, "combine": combine, "rows": rows, "trained": [each for each in acts["trained"] if each != name]}

    # operations

    @rule(name=NAMES, spec=st.sampled_from(SPECS))
    def attach(self, name, spec):
        free = name not in self.state.attachments and all(record.name != name for record in self.state.merged)
        if self.tried(lambda: effzoo.attach(self.model, spec, name=name), must=free):
            assert free and effzoo.status(self.model).active == (name,) == effzoo.status(self.model).trainable
            self.shaken(name)

    @rule(spec=st.sampled_from(BROKEN))
    def attach_what_is_broken(self, spec):
        assert not self.tried(lambda: effzoo.attach(self.model, spec, name="e"))

    @rule(name=NAMES)
    def detach(self, name):
        others = self.others(name)
        if self.tried(lambda: effzoo.detach(self.model, name), must=name in self.state.attachments):
            assert self.acts() == others

    @rule(names=st.lists(NAMES, max_size=3), combine=st.sampled_from(["stack", "average"]), scale=SCALES, number=st.integers(0, 3))
    def activate(self, names, combine, scale, number):
        train = names[:number]
        plain = scale == 1 and len(set(names)) == len(names) and all(name in self.state.attachments for name in names)
        scales = {name: scale for name in names[:1]}
        if self.tried(lambda: effzoo.activate(self.model, *names, combine=combine, scale=scales, train=train), must=plain):
            said = effzoo.status(self.model)
            assert said.active == tuple(names) and set(said.trainable) == set(train) and said.scales == dict.fromkeys(names, 1.0) | scales
            assert said.combine == ("average" if combine == "average" and len(names) > 1 else "stack")

    @rule(rows=st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1, max_size=3))
    def by_row(self, rows):
        known = all(row is None or row in self.state.attachments for row in rows)
        if self.tried(lambda: effzoo.activate(self.model, rows=rows), must=known):
            assert effzoo.status(self.model).rows == (tuple(rows) if any(rows) else None)

    @rule(name=NAMES)
    def merge(self, name):
        now, others, before = self.state.roster.now, self.others(name), self.computed()
        if self.tried(lambda: effzoo.merge(self.model, name)):
            assert self.acts() == others
            if name in now.names and before is not None:
                assert torch.allclose(self.output(), before, rtol=0, atol=1e-8)
            self.finished(name)

    @rule(name=NAMES)
    def unmerge(self, name):
        record = self.state.merged[-1] if self.state.merged else None
        acts = self.acts()
        since = self.state.roster.now
        if self.tried(lambda: effzoo.unmerge(self.model, name), must=record is not None and record.name == name):
            now = self.state.roster.now
            assert now == record.before if since == record.after else {**self.others(name), "trained": []} == {**acts, "trained": []}

    @rule(name=NAMES, fails=st.booleans(), off=st.booleans(), scale=st.sampled_from([1.0, 0.5]))
    def inside_a_context(self, name, fails, off, scale):
        before = whole(self.model)
        context = effzoo.disabled(self.model) if off else effzoo.active(self.model, name, scale=scale)
        try:
            with context:
                self.the_state_says_what_is_computed()
                assert effzoo.status(self.model).active == (() if off else (name,))
                if fails:
                    raise KeyError
        except (KeyError, EffzooError):
            pass
        assert whole(self.model) == before

    @rule(name=NAMES)
    def finish(self, name):
        before = self.computed()
        if self.tried(lambda: effzoo.peft.finish(self.model, name), must=name in self.state.attachments):
            self.finished(name)
            after = self.computed()
            assert before is None or torch.allclose(before, after, rtol=0, atol=1e-8)

    def finished(self, name):
        """What finishing rounds is another content."""
        if isinstance(self.contents[name], int) and "adamix" in str(self.spec_of(name)) + "diff":
            self.contents[name] = (self.contents[name], "finished")

    def spec_of(self, name):
        found = [record.attachment for record in self.state.merged if record.name == name] + [self.state.attachments.get(name)]
        return found[0].spec

    @rule(name=NAMES, other=NAMES)
    def save_and_load(self, name, other):
        with tempfile.TemporaryDirectory() as folder:
            if name not in self.state.attachments or self.state.merged:
                return
            assert self.tried(lambda: effzoo.save_adapter(self.model, folder, name=name), must=True)
            free = other not in self.state.attachments
            if self.tried(lambda: effzoo.load_adapter(self.model, folder, name=other), must=free):
                assert free
                self.contents[other] = self.contents[name]
                assert effzoo.status(self.model).active == (other,)

    @rule(name=NAMES, other=NAMES)
    def swap_weights(self, name, other):
        attached = self.state.attachments
        if name not in attached or other not in attached or self.state.merged:
            return
        before = {key: id(x) for key, x in self.model.named_parameters()}
        alike = attached[name].spec == attached[other].spec and attached[name].finished == attached[other].finished
        with tempfile.TemporaryDirectory() as folder:
            effzoo.save_adapter(self.model, folder, name=name)
            if self.tried(lambda: effzoo.peft.swap_weights(self.model, folder, name=other), must=alike):
                self.contents[other] = self.contents[name]
                assert not alike or before == {key: id(x) for key, x in self.model.named_parameters()}

    @rule(name=NAMES, one=NAMES, two=NAMES)
    def combine(self, name, one, two):
        if self.tried(lambda: effzoo.combine(self.model, {one: 0.5, two: 0.25}, name=name, head=one)):
            self.contents[name] = ("combined", one, two, self.contents[one], self.contents[two], self.at_base())

    @rule(name=NAMES, one=NAMES, two=NAMES, how=st.sampled_from(["fusion", "routed"]))
    def gather(self, name, one, two, how):
        if self.tried(lambda: effzoo.peft.gather(self.model, [one, two], name=name, how=how, head=one)):
            self.finished(one), self.finished(two)
            self.shaken(name)

    @rule(name=NAMES, mixture=NAMES)
    def extract(self, name, mixture):
        if self.tried(lambda: effzoo.peft.extract(self.model, mixture, 1, name=name)):
            self.shaken(name)

    def at_base(self):
        return digest(base_tensors(self.model))

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
        self.another_base(lambda: effzoo.quantise(self.model, bits))

    @rule()
    def dequantise(self):
        self.another_base(lambda: effzoo.dequantise(self.model))

    @rule(attention=st.sampled_from(["full", "longformer[window=2]", "lsh[chunk=4]", "nope"]))
    def swap_attention(self, attention):
        torch.manual_seed(self.epoch)
        self.another_base(lambda: effzoo.swap_attention(self.model, attention))

    def another_base(self, change):
        touched = any(any(".attn." in path or ".mlp." in path for path in record.modules) for record in self.state.merged)
        before = digest(base_tensors(self.model))
        if self.tried(change) and digest(base_tensors(self.model)) != before:
            assert not touched, "what is merged cannot be taken out any more"
            self.epoch += 1
            with torch.no_grad():
                tensors = base_tensors(self.model)
                originals = {f"{path}.{key}": x for record in reversed(self.state.merged) for (path, key), x in record.originals.items()}
                self.expected_base = digest({key: originals.get(key, x) for key, x in tensors.items()})
            frozen = self.state.frozen
            self.flags = [p.requires_grad or key in frozen for key, p in self.model.named_parameters() if ".adapters." not in key]

    @precondition(lambda self: any(p.requires_grad for p in self.model.parameters()))
    @rule()
    def a_pass_backward(self):
        """Only what is trained and acts gets a gradient; nothing is changed."""
        before = whole(self.model)
        try:
            rows = self.state.roster.now.rows
            out = self.model(input_ids=IDS if rows is None else IDS[: len(rows)])
            if out.logits.requires_grad:
                out.logits.square().sum().backward()
        except EffzooError:
            pass
        acts = self.state.roster.now
        for key, p in self.model.named_parameters():
            if p.grad is not None and ".adapters." in key:
                assert key.split(".adapters.")[1].split(".")[0] in acts.trained & set(acts.names)
            p.grad = None
        after = whole(self.model)
        assert {**before, "random": 0} == {**after, "random": 0}

    # what always holds

    def computed(self):
        """The output, or None where what acts cannot act together; then that is so however often it is tried."""
        try:
            return self.output()
        except EffzooError:
            return None

    @invariant()
    def the_state_says_what_is_computed(self):
        out = self.computed()
        known = self.outputs.setdefault(self.key(), out)
        assert (out is None) == (known is None) and (out is None or torch.equal(out, known)), self.key()

    @invariant()
    def status_is_true(self):
        said, state = effzoo.status(self.model), self.state
        assert tuple(said.attached) == tuple(state.attachments) and set(said.active) <= set(said.attached)
        hung = {key.split(".adapters.")[1].split(".")[0] for key in self.model.state_dict() if ".adapters." in key}
        assert hung == set(said.attached)
        flags = {key: p.requires_grad for key, p in self.model.named_parameters()}
        trained = {key.split(".adapters.")[1].split(".")[0] for key, flag in flags.items() if flag and ".adapters." in key}
        assert trained == set(said.trainable) == set(state.roster.now.trained)
        assert sum(row.trainable_tensors for row in said.tensors) == sum(flags.values())
        if said.attached:
            assert not any(flag for key, flag in flags.items() if ".adapters." not in key)
        else:
            assert list(flags.values()) == self.flags
        if not said.merged:
            assert digest(base_tensors(self.model)) == self.expected_base
        counts["steps"] += 1

    def teardown(self):
        for record in reversed(list(self.state.merged)):
            effzoo.unmerge(self.model, record.name)
        for name in list(effzoo.attached(self.model)):
            effzoo.detach(self.model, name)
        assert digest(base_tensors(self.model)) == digest(self.model.state_dict()) == self.expected_base
        assert [p.requires_grad for p in self.model.parameters()] == self.flags
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
