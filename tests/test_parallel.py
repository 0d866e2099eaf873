"""One sequence over several processes equals one process, and sends as many bytes as its attention kind needs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import free_port

import effzoo
from effzoo.attention import Context, create
from effzoo.errors import IncompatibleError, InputError
from effzoo.parallel import OverRanks, Split, attention, multiple_of

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
    params=[2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 3, 4))],
    ids=lambda n: f"{n} ranks",
)
def results(request, tmp_path_factory):
    """What each of the processes found: {case: (largest difference from one process, bytes sent by name)}."""
    folder, port = tmp_path_factory.mktemp("ranks"), free_port()
    arguments = [str(request.param), str(port), str(folder)]
    processes = [
        subprocess.Popen([sys.executable, str(PROGRAM), str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(request.param)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * request.param, errors[0][-2000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_one_process(results):
    """Attention of every kind, and whole models with adapters: padding, global tokens, memory, 29 positions."""
    wrong = {(rank, *case): found for rank, of_rank in enumerate(results) for case, (found, _) in of_rank.items()}
    assert len(wrong) > 60 * len(results)
    assert {case: found for case, found in wrong.items() if not found < 1e-10} == {}


def sent(results, kind, *, marked=False):
    """Bytes that each rank sent in a forward and backward pass of a kind, without padding and memory."""
    return [of_rank[kind, False, marked, False][1] for of_rank in results]


def test_a_window_sends_its_border(results):
    """Keys and values of window / 2 positions to each neighbour, and their gradients back."""
    ranks = len(results)
    for rank, found in enumerate(sent(results, "longformer")):
        neighbours = (rank > 0) + (rank < ranks - 1)
        # forward: own positions that neighbours see; backward: the gradients of theirs that were seen here
        assert found.get("fetch", 0) == 2 * neighbours * BATCH * HEADS * 3 * 2 * DIM * BYTES
        assert set(found) <= {"fetch"}


def test_full_attention_sends_keys_around_the_ring(results):
    """Forward the keys and values of all ranks but the next; backward those of all, with their gradients."""
    ranks = len(results)
    split = Split.of(N, Group(ranks))
    for rank, found in enumerate(sent(results, "full")):
        sizes = [end - first for first, end in map(split.range, range(ranks))]
        forward = N - sizes[(rank + 1) % ranks]
        backward = N if ranks > 1 else 0
        assert found.get("ring", 0) == BATCH * HEADS * DIM * BYTES * (2 * forward + 4 * backward)


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


@pytest.mark.parametrize("spec", ["lsh[chunk=4]", "blockwise[blocks=2]"])
def test_kinds_that_may_need_every_key_are_refused(spec):
    core = create(spec, Context(heads=2, head_dim=4, max_length=64))
    with pytest.raises(IncompatibleError, match=rf"attention '{core.name}' is not computed over ranks: .*; use full, "):
        attention(core, Split(Group(2), (0, 8, 16)), *[torch.randn(1, 2, 8, 4)] * 3, mask=None, memory=None)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("gpt2", {"residual": "reversible"}, "a model with a reversible residual is not computed over ranks"),
    ("bert", {"experts": 2}, "a model with experts is not computed over ranks"),
])  # fmt: skip
def test_models_that_need_the_whole_sequence_are_refused(name, options, message, tiny):
    with pytest.raises(IncompatibleError, match=message):
        OverRanks(effzoo.build(name, **{**tiny, **options}), Group(2))


@pytest.mark.parametrize("method", ["unipelt", "ladder"])
def test_adapters_that_read_the_whole_sequence_are_refused(method, tiny):
    spread = OverRanks(effzoo.build("bert", **tiny, peft=method), Group(2))
    with pytest.raises(IncompatibleError, match="whole sequence"):
        spread(torch.randint(2, 50, (1, 12)))
