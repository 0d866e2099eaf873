"""One sequence over several processes equals one process, and sends as many bytes as its attention kind needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks_program import CASES, MODELS, SIZES
from support import free_port

import effzoo
from effzoo.attention import Context, Mask, create
from effzoo.errors import IncompatibleError, InputError
from effzoo.parallel import OverRanks, Split, attention, cost, hashed, multiple_of
from effzoo.plans import spread

PROGRAM = Path(__file__).parent / "ranks_program.py"
BATCH, HEADS, DIM, N, BYTES = 2, 2, 4, 29, 8  # of the program's inputs


class Group:
    """As many ranks, of which this is one."""

    def __init__(self, ranks, rank=0):
        self.ranks, self.number = ranks, rank

    def size(self):
        return self.ranks

    def rank(self):
        return self.number


@pytest.fixture(
    scope="module",
    params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2, 3, 4)],
    ids=lambda n: f"{n} ranks",
)
def found(request, tmp_path_factory):
    """What each of the processes found: `results`, and what was refused."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    arguments = [str(request.param), str(port), str(folder)]
    processes = [
        subprocess.Popen([sys.executable, str(PROGRAM), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(request.param)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * request.param, errors[0][-2000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def results(found):
    """Of each process {case: (largest difference from one process, bytes sent by name, scores)}."""
    return [of_rank for of_rank, _ in found]


@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_one_process(results):
    """Attention of every kind, and whole models with adapters: padding, global tokens, memory, 29 positions."""
    wrong = {(rank, *case): found for rank, of_rank in enumerate(results) for case, (found, *_) in of_rank.items()}
    assert len(wrong) > 60 * len(results)
    assert {case: found for case, found in wrong.items() if not found < 1e-10} == {}


DIFFERENCES = {
    "version": f"version of effzoo is {effzoo.__version__} on rank 0, and 0.1.7 on rank {{last}}",
    "adapter": r"adapters is default: lora\[rank=2\] on rank 0, and default: lora\[rank=3\] on rank {last}",
    "dtype": r"[\w.]+ is float32\[53, 16\] \w+ on rank 0, and float64\[53, 16\] \w+ on rank {last}",
    "weight": r"blocks.1.mlp.up.weight is float32\[24, 16\] \w+ on rank 0, and float32\[24, 16\] \w+ on rank {last}",
    "length": r"input_ids is int64\[2, 29\] \w+ on rank 0, and int64\[2, 28\] \w+ on rank {last}",
    "ids": r"input_ids is int64\[2, 29\] \w+ on rank 0, and int64\[2, 29\] \w+ on rank {last}",
    "train": "training is True on rank 0, and False on rank {last}",
}


def test_a_rank_that_differs_is_refused_on_all_naming_the_difference(found):
    refused = [of_rank for _, of_rank in found]
    assert all(of_rank == refused[0] for of_rank in refused)
    assert list(refused[0]) == ([] if len(found) == 1 else list(DIFFERENCES))
    for what, said in refused[0].items():
        wanted = DIFFERENCES[what].replace("{last}", str(len(found) - 1))
        assert re.fullmatch(f"the ranks of one sequence differ: {wanted}; give all the same", said), said


def sent(results, kind, *, marked=False):
    """Bytes that each rank sent in a forward and backward pass of a kind, without padding and memory."""
    return [of_rank[kind, False, marked, False][1] for of_rank in results]


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_bytes_are_those_of_the_closed_form(results, kind, marked):
    """`effzoo.parallel.cost.sent`, forward and backward together; marks of global tokens are gathered beside it."""
    (spec, causal), ranks = CASES[kind], len(results)
    core = create(spec, Context(heads=HEADS, head_dim=DIM, causal=causal, max_length=64))
    if marked and not core.knows_globals():
        return
    order = "zigzag" if kind == "zigzag" else "contiguous"
    for rank, found in enumerate(sent(results, kind, marked=marked)):
        split = Split.of(N, Group(ranks, rank), multiple_of(core), order)
        closed = cost.sent(core, split, cost.Shapes(BATCH, torch.float64, globals=3 * marked))
        marks = (ranks - 1) * BATCH * split.size() if marked else 0
        assert sum(found.values()) == pytest.approx(closed.forward + closed.backward + marks, rel=1e-12), rank


@pytest.mark.parametrize("kind", [kind for kind in CASES if CASES[kind][0][:3] not in ("lin", "per", "nys")])
def test_scores_are_those_of_the_definition(kind):
    """Of windows where the sequence has no end near: in the middle of three ranks."""
    spec, causal = CASES[kind]
    core = create(spec, Context(heads=HEADS, head_dim=DIM, causal=causal, max_length=64))
    order = "zigzag" if kind == "zigzag" else "contiguous"
    n, ranks = (N, (0, 1, 2)) if core.name in ("full", "blockwise") else (96, (1,))
    for rank in ranks:
        split = Split.of(n, Group(3, rank), multiple_of(core), order)
        seen = core.pattern(n, Mask()).expand(1, HEADS, n, n)[0, :, split.positions()]
        assert cost.scores(core, split) == float(seen.sum()) / HEADS, rank


def test_a_step_of_a_model_sends_what_the_plan_says(results):
    """Of the rank in the middle: attention and gradients; beside it the marks of global tokens and the pooled mean."""
    ranks = len(results)
    (name, options, _), *_ = [case for case in MODELS if case[1].get("pooling") == "mean"]
    ((_, found, _),) = [of_case for case, of_case in results[ranks // 2].items() if case[:2] == (name, str(options))]
    model = effzoo.build(name, **SIZES, pad_token=1, **options).double()
    made = spread(model, batch=BATCH, length=N, ranks=ranks)
    held = Split.of(N, Group(ranks, ranks // 2)).size()
    pooled = 2 * 2 * (ranks - 1) / ranks * BATCH * SIZES["dim"] * BYTES
    assert sum(found.values()) == pytest.approx(made.sent + (ranks - 1) * BATCH * held + pooled, rel=1e-12)


def test_a_window_sends_its_border(results):
    """Keys and values of window / 2 positions to each neighbour, and their gradients back."""
    ranks = len(results)
    for rank, found in enumerate(sent(results, "longformer")):
        neighbours = (rank > 0) + (rank < ranks - 1)
        # forward: own positions that neighbours see; backward: the gradients of theirs that were seen here
        assert found.get("fetch", 0) == 2 * neighbours * BATCH * HEADS * 3 * 2 * DIM * BYTES
        assert set(found) <= {"fetch"}


@pytest.mark.parametrize(("kind", "order"), [("full", "contiguous"), ("zigzag", "zigzag")])
def test_full_attention_sends_keys_around_the_ring(results, kind, order):
    """Keys and values of all ranks but the next, forward and backward; and the gradients of all back home."""
    ranks = len(results)
    split = Split.of(N, Group(ranks), order=order)
    for rank, found in enumerate(sent(results, kind)):
        keys = N - split.size((rank + 1) % ranks)
        gradients = N if ranks > 1 else 0
        assert found.get("ring", 0) == BATCH * HEADS * DIM * BYTES * 2 * (2 * keys + gradients)


def test_in_zigzag_order_each_rank_computes_as_many_scores(results):
    """The pieces r and 2 R - 1 - r of size s see s^2 (2 R - 1) + s (s + 1) keys; contiguous slices differ."""
    ranks, n = len(results), 48
    size = n // (2 * ranks)
    orders = ("zigzag of 48", "contiguous of 48")
    zigzag, contiguous = ([of_rank[order, *[False] * 3][2] for of_rank in results] for order in orders)
    assert zigzag == [size**2 * (2 * ranks - 1) + size * (size + 1)] * ranks
    assert sum(contiguous) == n * (n + 1) // 2 and len(set(contiguous)) == ranks


def test_pieces_in_zigzag_order():
    split = Split.of(29, Group(2, 1), order="zigzag")
    assert [split.pieces(rank) for rank in range(2)] == [[(0, 7), (21, 29)], [(7, 14), (14, 21)]]
    assert torch.equal(split.own(torch.arange(29)[None]), split.positions()[None])
    with pytest.raises(InputError, match="3 positions are fewer than 4 pieces, two of each of 2 ranks"):
        Split.of(3, Group(2), order="zigzag")


@pytest.mark.parametrize("name", ["bert", "longformer", "modernbert"])
def test_zigzag_order_is_for_full_causal_attention(name, tiny):
    with pytest.raises(IncompatibleError, match="'zigzag' is for models of full causal attention; use order='contig"):
        OverRanks(effzoo.build(name, **tiny), Group(2), order="zigzag")
    windows = create("longformer[window=4]", Context(heads=1, head_dim=4, causal=True))
    with pytest.raises(IncompatibleError, match="'zigzag' is for full causal attention; others need order='contig"):
        attention(windows, Split.of(8, Group(2), order="zigzag"), *[torch.randn(1, 1, 4, 4)] * 3, mask=Mask())


@pytest.mark.parametrize("kind", ["blockwise", "blockwise causal", "blocks of 5", "many blocks"])
def test_blockwise_attention_sends_the_blocks_that_are_named(results, kind):
    """By the definition: forward the keys and values that others see, backward the gradients of theirs."""
    spec, causal = CASES[kind]
    core = create(spec, Context(heads=HEADS, head_dim=DIM, causal=causal, max_length=64))
    seen = core.pattern(N, Mask()).expand(1, HEADS, N, N)[0]
    split = Split.of(N, Group(len(results)))
    for rank, found in enumerate(sent(results, kind)):
        mine = slice(*split.range(rank))
        given = sum(
            int(seen[:, slice(*split.range(other)), mine].any(dim=1).sum())
            for other in range(len(results))
            if other != rank
        )
        wanted = int(seen[:, mine].any(dim=1).sum()) - int(seen[:, mine, mine].any(dim=1).sum())
        assert found.get("blocks", 0) == BATCH * 2 * DIM * BYTES * (given + wanted)
        assert set(found) <= {"blocks"}


def test_compressed_keys_cost_the_same_at_any_length(results):
    """linformer: an all-reduce of E K and F V; perceiver: the outputs of the latents, of width 2 d, and their lse."""
    ring = 2 * (len(results) - 1) / len(results)
    for found in sent(results, "linformer"):
        assert found.get("total", 0) == pytest.approx(2 * ring * 2 * BATCH * HEADS * 5 * DIM * BYTES)
    for found in sent(results, "perceiver"):
        assert found["total"] == pytest.approx(2 * ring * BATCH * HEADS * 3 * 2 * DIM * BYTES)
        assert found["softmax"] == (len(results) - 1) * BATCH * HEADS * 3 * BYTES


@pytest.mark.parametrize(("n", "ranks", "multiple", "bounds"), [
    (29, 4, 1, (0, 7, 14, 21, 29)), (29, 3, 4, (0, 8, 20, 29)), (4, 4, 1, (0, 1, 2, 3, 4)), (5, 1, 3, (0, 5)),
])  # fmt: skip
def test_slices_differ_by_one_unit(n, ranks, multiple, bounds):
    assert Split.of(n, Group(ranks), multiple).bounds == bounds


def test_more_ranks_than_chunks_are_refused():
    with pytest.raises(InputError, match="10 positions are 3 chunks of 4 positions, fewer than 4 ranks"):
        Split.of(10, Group(4), multiple=multiple_of(create("local[chunk=4]", Context(heads=1, head_dim=4))))


@pytest.mark.parametrize(("rounds", "ranks"), [(1, 4), (4, 4), (8, 2), (4, 64)])
def test_tokens_of_lsh_travel_less_than_all_keys_beyond_one_and_a_half_ranks_per_round(rounds, ranks):
    """On sorts of random query-keys, within 10% of rounds (3 d + 1) / (2 d ranks): why it is refused, and where not."""
    core = create(f"lsh[rounds={rounds}, chunk=16]", Context(heads=2, head_dim=32, max_length=8192))
    found = hashed(core, torch.randn(1, 2, 8192, 32), ranks)
    share = rounds * 97 / (64 * ranks)
    assert found.slots / found.gathered == pytest.approx(share, rel=0.1 + 0.2 * (ranks == 64))
    with pytest.raises(IncompatibleError, match=f"{rounds} rounds and {ranks} ranks {share:.2g} times the bytes"):
        attention(core, Split.of(64, Group(ranks)), *[torch.randn(1, 2, 64 // ranks, 32)] * 2, mask=None)


def test_kinds_that_may_need_every_key_are_refused():
    core = create("local[chunk=4, circular=true]", Context(heads=2, head_dim=4, max_length=64))
    with pytest.raises(IncompatibleError, match=rf"attention '{core.name}' is not computed over ranks: .*; use full, "):
        attention(core, Split(Group(2), (0, 8, 16)), *[torch.randn(1, 2, 8, 4)] * 3, mask=None, memory=None)


@pytest.mark.parametrize("router", ["base", "expert_choice"])
def test_routers_that_assign_all_tokens_together_are_refused(router, tiny):
    spread = OverRanks(effzoo.build("bert", **tiny, experts=2, router=router), Group(1))
    with pytest.raises(IncompatibleError, match=f"router '{router}' assigns all tokens together"):
        spread(torch.randint(2, 50, (1, 12)))


@pytest.mark.parametrize("method", ["unipelt", "ladder"])
def test_adapters_that_read_the_whole_sequence_are_refused(method, tiny):
    spread = OverRanks(effzoo.build("bert", **tiny, peft=method), Group(1))
    with pytest.raises(IncompatibleError, match="whole sequence"):
        spread(torch.randint(2, 50, (1, 12)))


@pytest.mark.parametrize("method", ["diff", "head_pruning[alpha=1.0]"])
def test_adapters_that_draw_their_weights_are_refused_in_training(method, tiny):
    spread = OverRanks(effzoo.build("bert", **tiny, peft=method, pooler=False), Group(1))
    with pytest.raises(IncompatibleError, match="draw their weights in each training pass"):
        spread(torch.randint(2, 50, (1, 12)))
    spread.model.eval()
    assert spread(torch.randint(2, 50, (1, 12))).last_hidden_state.shape == (1, 12, 16)
