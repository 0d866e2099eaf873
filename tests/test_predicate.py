"""Kinds that are one line: equal to their definition, as fast as what they see, in every mode that a model has."""

import copy
import pickle

import pytest
import torch

import effzoo
from effzoo.attention import Context, Mask, PredicateAttention, tile_map
from effzoo.attention.core import Cache
from effzoo.attention.reference import dense
from effzoo.checks.cost import CostCounter
from effzoo.errors import IncompatibleError, InputError, OptionError


class Strided(PredicateAttention):
    name = "strided"

    def __init__(self, context, stride=4):
        super().__init__(context)
        self.stride = stride

    def visible(self, query, key):
        return (query - key) % self.stride == 0


class Documents(PredicateAttention):
    name = "documents"

    def visible(self, query, key):
        return query // 50 == key // 50


class Near(PredicateAttention):
    name = "near"

    def visible(self, query, key):
        return (query - key).abs() <= 20


class Buckets(PredicateAttention):
    name = "buckets"

    def visible(self, query, key):
        return (query * query) % 7 == (key * 3) % 7


class ByHead(PredicateAttention):
    name = "by_head"

    def visible(self, query, key, *, head):
        return ((query - key) % (head + 1) == 0) | (key == 0)


class Halves(PredicateAttention):
    name = "halves"

    def visible(self, query, key, *, length):
        return (2 * query < length) == (2 * key < length)


class Nothing(PredicateAttention):
    name = "nothing"

    def visible(self, query, key):
        return query < key * 0


class Marked(PredicateAttention):
    """A user's own global tokens."""

    name = "marked"

    def visible(self, query, key, *, query_global, key_global):
        return (query == key) | query_global | key_global


KINDS = [Strided, Documents, Near, Buckets, ByHead, Halves, Nothing, Marked]


def built(cls, *, causal=False, n=64, heads=3, **options):
    return cls(Context(heads=heads, head_dim=4, causal=causal, max_length=n), **options).double()


def inputs(n, heads=3, batch=2):
    drawn = torch.randn(3, batch, heads, n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return [x.clone().requires_grad_() for x in drawn]


def by_hand(core, n, valid, is_global):
    """The predicate asked pair by pair, [batch, heads, n, n]."""
    allowed = torch.zeros(len(valid), core.context.heads, n, n, dtype=torch.bool)
    for row in range(len(valid)):
        length = int(valid[row].nonzero().max()) + 1 if valid[row].any() else 0
        for head in range(core.context.heads):
            facts = {"head": torch.tensor(head), "length": torch.tensor(length)}
            for i in range(n):
                for j in range(n):
                    facts |= {"query_global": is_global[row, i], "key_global": is_global[row, j]}
                    sees = core.visible(torch.tensor(i), torch.tensor(j), **{name: facts[name] for name in core.reads})
                    allowed[row, head, i, j] = (
                        bool(sees) and bool(valid[row, j]) and (j <= i or not core.context.causal)
                    )
    return allowed


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_predicate_is_computed_as_it_says_pair_by_pair(cls, causal):
    n, core = 13, built(cls, causal=causal)
    leaves = inputs(n)
    valid = torch.arange(n) < torch.tensor([n, 8])[:, None]
    is_global = (torch.arange(n) == torch.tensor([2, 5])[:, None]) & torch.tensor(cls is Marked)
    out = core(*leaves, mask=Mask(valid, is_global if cls is Marked else None))
    wanted = dense(*leaves, by_hand(core, n, valid, is_global))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    direction = torch.randn(out.shape, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad(out, leaves, direction), torch.autograd.grad(wanted, leaves, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("n", [1, 63, 64, 130, 331])
def test_tiles_rows_and_steps_are_the_definition_at_every_length(cls, n):
    for causal in (False, True):
        core, leaves = built(cls, causal=causal, n=n), inputs(n)
        valid = torch.arange(n) < torch.tensor([n, max(1, n - 20)])[:, None]
        for mask in (Mask(), Mask(valid)):
            wanted = core.dense(*leaves, mask=mask)
            torch.testing.assert_close(core(*leaves, mask=mask), wanted, rtol=0, atol=1e-12)
            where = torch.tensor([[0, n // 2, n - 1]]).expand(2, -1)
            at = [x.gather(2, where[:, None, :, None].expand(-1, 3, -1, 4)) for x in (leaves[0], wanted)]
            torch.testing.assert_close(core.forward_at(where, at[0], *leaves[1:], mask=mask), at[1], rtol=0, atol=1e-12)
        if causal and cls is not Halves:
            _, state = core.step(*(x[:, :, : n // 2 + 1] for x in leaves), mask=Mask(), past=None)
            if n > n // 2 + 1:
                out, _ = core.step(*(x[:, :, n // 2 + 1 :] for x in leaves), mask=Mask(), past=state)
                torch.testing.assert_close(
                    out, core.dense(*leaves, mask=Mask())[:, :, n // 2 + 1 :], rtol=0, atol=1e-12
                )


@pytest.mark.parametrize(
    ("cls", "share"),
    [
        (lambda c: Strided(c, 4), 1 / 4),
        (lambda c: Strided(c, 7), 1 / 7),
        (Documents, 50 / 1024),
        (Near, 41 / 1024),
        (Buckets, 1 / 7),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_work_shrinks_with_what_is_seen(cls, share, causal):
    """Multiply-adds against full attention, forward and backward: the share that is seen, and at most what tiles of 64
    add at its borders."""
    work = []
    for kind in (cls, effzoo.attention.get("full")):
        core = kind(Context(heads=2, head_dim=32, causal=False, max_length=1024))
        leaves = [torch.randn(1, 2, 1024, 32) for _ in range(3)]
        core.context = Context(heads=2, head_dim=32, causal=causal and kind is cls, max_length=1024)
        core(*leaves, mask=Mask())
        leaves = [x.requires_grad_() for x in leaves]
        with CostCounter() as counter:
            core(*leaves, mask=Mask()).sum().backward()
        work.append(counter.cost.work)
    assert work[0] / work[1] <= share + 0.16  # gathering, and for windows a tile on each side


def test_tiles_are_found_once_for_a_kind_its_options_and_a_length(monkeypatch):
    asked = []
    monkeypatch.setattr(
        Strided, "visible", lambda self, query, key: asked.append(self.stride) or (query - key) % self.stride == 0
    )
    tile_map._cache.clear()
    for _ in range(2):
        core = built(Strided, n=70)
        core(*inputs(70), mask=Mask())
    first = len(asked)
    core(*inputs(70), mask=Mask())
    assert len(asked) == first
    core.stride = 5  # an option that is set on a built core
    torch.testing.assert_close(core(*inputs(70), mask=Mask()), core.dense(*inputs(70), mask=Mask()), rtol=0, atol=1e-12)
    assert 5 in asked
    for n in range(1, 200):
        built(Strided, n=n)(*inputs(n, batch=1), mask=Mask())
    assert len(tile_map._cache) <= tile_map.CACHED


def test_what_a_predicate_may_not_be_is_said():
    class Asks(PredicateAttention):
        name = "asks"

        def visible(self, query, key, *, colour):
            return query == key

    class Counts(PredicateAttention):
        name = "counts"

        def visible(self, query, key):
            return query - key

    with pytest.raises(OptionError, match="may name the facts head, length, .* got colour"):
        built(Asks)
    with pytest.raises(InputError, match="is a boolean tensor .* got a tensor of torch.int64"):
        built(Counts)(*inputs(5), mask=Mask())
    core = built(Halves, causal=True)
    with pytest.raises(IncompatibleError, match="depends on the length, which grows; generate with use_cache=False"):
        core.step(*inputs(5), mask=Mask(), past=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["full", "longformer[window=4, dilation=(1, 2)]", "local[chunk=4]", "blockwise", "lsh[chunk=4, rounds=2]"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_graph_serves_every_length(kind, dropout):
    """The first length makes a graph of its own, the second one for all."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    core = (
        effzoo.attention.create(kind, Context(heads=2, head_dim=4, dropout=dropout, max_length=64))
        .double()
        .train(dropout > 0)
    )
    traced = torch.compile(lambda *x: core(*x, mask=Mask()), backend="aot_eager", fullgraph=True)
    for n in (24, 25, 31, 40, 50):
        leaves = inputs(n, heads=2)[: len(core.uses(Mask()))]
        out = traced(*leaves)
        out.sum().backward()
        if not dropout:
            torch.testing.assert_close(out, core.dense(*leaves, mask=Mask()), rtol=0, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


def test_copies_are_found_by_their_own_number():
    core = effzoo.attention.create("longformer[window=4]", Context(heads=2, head_dim=4))
    assert len({core._number, copy.deepcopy(core)._number, pickle.loads(pickle.dumps(core))._number}) == 3


def test_a_model_decodes_with_a_kind_of_ones_own(tiny):
    with effzoo.scope():
        effzoo.attention.register("strided_here")(
            type("Here", (Strided,), {"__init__": lambda self, context: Strided.__init__(self, context)})
        )
        model = effzoo.build("gpt2", attention="strided_here", task="causal_lm", **tiny).eval()
    ids = torch.randint(1, 50, (2, 11))
    cache = Cache()
    with torch.no_grad():
        pieces = [slice(0, 6), *(slice(place, place + 1) for place in range(6, 11))]
        found = [model(input_ids=ids[:, piece], cache=cache).logits for piece in pieces]
        torch.testing.assert_close(torch.cat(found, dim=1), model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
