"""The analyses of the lab for attention: spectra, cost of a layer, patterns and hashing steps, and repetition."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import effzoo
from effzoo.attention import Context, Mask
from effzoo.attention.hashing import buckets_of
from effzoo.errors import IncompatibleError, OptionError
from effzoo.lab.analyses import layer_cost, patterns, repetition, spectrum
from effzoo.lab.analyses.threads import one_thread
from effzoo.plans import opt_table
from effzoo.plots import pattern
from effzoo.registry import attention as registry


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def core_of(spec, n, heads=1, head_dim=6):
    return registry.create(spec, Context(heads=heads, head_dim=head_dim, max_length=n)).double().eval()


# spectrum


@pytest.mark.parametrize("shape", [(7, 7), (3, 5, 9), (2, 2, 11, 4)])
def test_cumulative_is_the_share_of_the_singular_values_that_numpy_finds(shape):
    matrices = drawn(*shape)
    values = np.linalg.svd(matrices.numpy(), compute_uv=False)
    wanted = np.cumsum(values, axis=-1) / values.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(spectrum.cumulative(matrices).numpy(), wanted, atol=1e-12)


def test_equal_singular_values_give_a_line_and_rank_r_is_full_at_r():
    orthogonal = torch.linalg.qr(drawn(9, 9)).Q
    torch.testing.assert_close(spectrum.cumulative(orthogonal), torch.arange(1, 10, dtype=torch.float64) / 9)
    curve = spectrum.cumulative(drawn(9, 3) @ drawn(3, 9, seed=1))
    assert curve[1] < 1 - 1e-3 and abs(float(curve[2]) - 1) < 1e-12


def test_attention_matrices_are_those_of_the_projections():
    """Each layer by hand: the input of its attention, its q and k, softmax(Q K^T / sqrt(d))."""
    torch.manual_seed(0)
    model = (
        effzoo.build(
            "bert", layers=2, dim=12, heads=3, mlp=16, vocab=19, max_length=16, task="classification", num_labels=2
        )
        .double()
        .eval()
    )
    ids = torch.randint(0, 19, (2, 11))
    inputs = []
    hooks = [block.attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.blocks]
    found = spectrum.attention_matrices(model.train(), ids)
    for hook in hooks:
        hook.remove()
    assert model.training and len(found) == len(inputs) == 2
    for block, x, matrices in zip(model.blocks, inputs, found, strict=True):
        q, k = (
            (x @ linear.weight.T + linear.bias).view(2, 11, 3, 4).permute(0, 2, 1, 3)
            for linear in (block.attn.q, block.attn.k)
        )
        scores = np.einsum("bhid,bhjd->bhij", q.detach().numpy(), k.detach().numpy()) / math.sqrt(4)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        np.testing.assert_allclose(matrices.numpy(), weights, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), [("bert", {"attention": "local[chunk=4]"}), ("gpt2", {})])
def test_attention_matrices_of_other_kinds_and_of_causal_models_are_refused(name, options):
    model = effzoo.build(name, layers=1, dim=8, heads=2, mlp=8, vocab=7, max_length=8, **options)
    with pytest.raises(IncompatibleError, match="swap_attention"):
        spectrum.attention_matrices(model, torch.zeros(1, 4, dtype=torch.long))


def test_the_number_of_threads_comes_back_also_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        _ = 1 / 0
    assert torch.get_num_threads() == before


# cost of a layer


@pytest.mark.parametrize(
    ("n", "dim", "heads", "mlp", "batch"), [(17, 24, 3, None, 2), (1, 8, 1, 5, 1), (64, 16, 4, 48, 3)]
)
def test_the_formulas_are_what_torch_counts_in_the_real_block(n, dim, heads, mlp, batch):
    block = layer_cost.layer(dim, heads, mlp, longest=64, backend="reference")
    counted = layer_cost.counted(block, torch.randn(batch, n, dim))
    assert counted == layer_cost.operations(n, dim, mlp, batch=batch)
    with torch.device("meta"):
        assert layer_cost.counted(layer_cost.layer(dim, heads, mlp, longest=64), torch.empty(batch, n, dim)) == counted
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in block.modules())


def test_what_the_counter_does_not_see_is_refused():
    with pytest.raises(IncompatibleError, match="reference"):
        layer_cost.counted(layer_cost.layer(8, 2), torch.randn(1, 5, 8))


def test_the_crossings_of_the_cost_model():
    """Attention = projections at n = 2 d, where the feed-forward is half; = feed-forward at 4 d; = all the rest at 6
    d."""
    dim = 7
    at = {ratio: layer_cost.shares(layer_cost.operations(ratio * dim, dim)) for ratio in (2, 4, 6)}
    assert at[2]["attention"] == at[2]["projections"] and at[2]["feed-forward"] == 0.5
    assert at[4]["attention"] == at[4]["feed-forward"] and at[6]["attention"] == 0.5
    assert layer_cost.shares(layer_cost.operations(1, 10**6))["feed-forward"] == pytest.approx(2 / 3, abs=1e-5)


def test_sizes_of_the_cost_model_are_checked():
    with pytest.raises(OptionError, match="at least 1"):
        layer_cost.operations(0, 8)
    with pytest.raises(OptionError, match="heads divide dim"):
        layer_cost.layer(10, 3)


def test_every_part_and_the_whole_layer_take_time():
    taken = layer_cost.seconds(layer_cost.layer(16, 2), torch.randn(1, 9, 16), rounds=3, limit=0.1)
    assert list(taken) == [*layer_cost.PARTS, layer_cost.WHOLE] and min(taken.values()) > 0


@pytest.mark.slow
def test_the_memory_of_opt_is_that_of_its_parameters():
    """Full, float16 with float32 copies: 2 bytes of weight, 2 of gradient, 8 of states, 4 of copy for each of P
    parameters."""
    memory = opt_table(length=16, layers=2, dim=32, heads=4, mlp=64, vocab=50, max_length=16).columns
    full, lora = memory.values()
    # embeddings, blocks, last norm
    parameters = 50 * 32 + 18 * 32 + 2 * (4 * (32 * 32 + 32) + 2 * 32 * 64 + 32 + 64 + 4 * 32) + 2 * 32
    assert full["weights"] == 2 * parameters
    assert full["gradients of trainable parameters"] == 2 * parameters
    assert full["float32 copy"] == 4 * parameters
    assert full["hidden states, L (20 h s + 3 s^2)"] == 2 * 2 * (20 * 32 * 16 + 3 * 16**2)
    assert lora["optimizer states"] < full["optimizer states"] / 2
    assert full["hidden states, planned, weights written out"] > full["hidden states, planned, fused attention"]


# patterns


@pytest.mark.parametrize("n", [1, 5, 23])
@pytest.mark.parametrize(("window", "dilation"), [(2, 1), (6, 1), (4, 3), (40, 1)])
def test_pairs_of_a_window_are_counted_one_by_one(n, window, dilation):
    wanted = sum(abs(i - j) <= dilation * window // 2 and (i - j) % dilation == 0 for i in range(n) for j in range(n))
    assert patterns.window_pairs(n, window, dilation) == wanted
    drawn_cells = pattern({"name": "longformer", "window": window, "dilation": dilation}, n)
    assert int((drawn_cells > 0).sum()) == wanted


@pytest.mark.parametrize(("n", "window", "count"), [(9, 2, 1), (23, 6, 4), (7, 10, 3), (12, 4, 0)])
def test_pairs_with_global_tokens_are_counted_one_by_one(n, window, count):
    wanted = sum(min(i, j) < count or abs(i - j) <= window // 2 for i in range(n) for j in range(n))
    assert patterns.global_pairs(n, window, count) == wanted


@pytest.mark.parametrize(("n", "chunk", "back"), [(9, 3, 1), (23, 5, 2), (4, 7, 1), (8, 2, 0)])
def test_pairs_of_chunks_are_counted_one_by_one(n, chunk, back):
    wanted = sum(i != j and 0 <= i // chunk - j // chunk <= back for i in range(n) for j in range(n))
    assert patterns.chunk_pairs(n, chunk, back) == wanted


@pytest.mark.parametrize(
    ("function", "given"),
    [(patterns.window_pairs, (9, 3)), (patterns.global_pairs, (4, 2, 4)), (patterns.chunk_pairs, (9, 0))],
)
def test_sizes_of_patterns_are_checked(function, given):
    with pytest.raises(OptionError, match="got"):
        function(*given)


@pytest.mark.parametrize("spec", ["full", "local[chunk=4,look_forward=1]", "blockwise[blocks=2]"])
def test_the_attention_matrix_is_the_softmax_under_the_pattern(spec):
    n, core = 13, core_of(spec, 13, heads=2)
    q, k = drawn(2, 2, n, 6), drawn(2, 2, n, 6, seed=1)
    allowed = core.pattern(n, Mask()).expand(2, 2, n, n).numpy()
    weights = np.exp(np.einsum("bhid,bhjd->bhij", q.numpy(), k.numpy()) / math.sqrt(6)) * allowed
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(patterns.attention_matrix(core.train(), q, k).numpy(), weights, atol=1e-10)
    assert core.training


@pytest.mark.parametrize(("n", "chunk", "back"), [(24, 4, 1), (23, 5, 1), (17, 3, 2)])
def test_what_lsh_attends_is_hash_sort_and_chunks_by_hand(n, chunk, back):
    """Hash with argmax [x R, -x R], sort by (bucket, position), cut: a query sees its chunk and those before, in any
    round, not itself."""
    core = core_of({"name": "lsh", "rounds": 2, "chunk": chunk, "buckets": 4, "look_back": back, "seed": 3}, n, heads=2)
    x = drawn(1, 2, n, 6)
    seen = np.zeros((2, n, n), dtype=bool)
    reach = patterns.within_reach(buckets_of(x, core.rotations, core.factors), chunk, back)
    for r in range(2):
        for head in range(2):
            turned = x[0, head].numpy() @ core.rotations[r, head].numpy()
            bucket = np.argmax(np.concatenate([turned, -turned], axis=1), axis=1)
            place = np.empty(n, dtype=int)
            place[sorted(range(n), key=lambda i, bucket=bucket: (bucket[i], i))] = np.arange(n)
            gap = place[:, None] // chunk - place[None, :] // chunk
            assert (reach[r, 0, head].numpy() == ((gap >= 0) & (gap <= back))).all()
            same = patterns.same_bucket(x, x, core.rotations, core.factors)[r, 0, head].numpy()
            assert (same == (bucket[:, None] == bucket[None, :])).all()
            seen[head] |= (gap >= 0) & (gap <= back) & ~np.eye(n, dtype=bool)
    weights = patterns.attention_matrix(core, x)[0].numpy()
    rows = seen.any(-1)  # a token that sees no other sees itself
    assert ((weights > 0) == np.where(rows[..., None], seen, np.eye(n, dtype=bool))).all()


def test_sorted_pairs_with_shared_buckets_are_blocks_on_the_diagonal():
    bucket = torch.tensor([[2, 0, 1, 0, 2, 2, 0]])
    pairs = bucket.unsqueeze(-1) == bucket.unsqueeze(-2)
    wanted = torch.block_diag(torch.ones(3, 3), torch.ones(1, 1), torch.ones(3, 3)).bool()
    assert (patterns.in_order_of(pairs, bucket, bucket)[0] == wanted).all()
    apart = torch.arange(9).view(1, 3, 3)
    found = patterns.in_order_of(apart, torch.tensor([[1, 0, 2]]), torch.tensor([[5, 5, 1]]))
    assert found[0].tolist() == [[5, 3, 4], [2, 0, 1], [8, 6, 7]]


def test_what_pairs_catch_of_full_attention():
    x = drawn(1, 2, 9, 5)
    scores = np.einsum("bhid,bhjd->bhij", x.numpy(), (x / x.norm(dim=-1, keepdim=True)).numpy())
    weights = np.exp(scores) * ~np.eye(9, dtype=bool)
    weights /= weights.sum(-1, keepdims=True)
    pairs = drawn(1, 2, 9, 9, seed=1) > 0
    np.testing.assert_allclose(patterns.caught(x, pairs).numpy(), (weights * pairs.numpy()).sum(-1), atol=1e-12)
    torch.testing.assert_close(
        patterns.caught(x, torch.ones(9, 9, dtype=torch.bool)), torch.ones(1, 2, 9, dtype=torch.float64)
    )


def test_clusters_have_the_length_that_is_asked_and_stand_together():
    x = patterns.clusters(50, 8, 3, spread=0.05, length=2.5, seed=1)[0, 0]
    torch.testing.assert_close(x.norm(dim=-1), torch.full((50,), 2.5))
    near = (x @ x.T / 2.5**2) > 0.9
    assert len({tuple(row.tolist()) for row in near}) == 3


# repetition


class Oracle(nn.Module):
    """Knows the word from the first half; says symbol 1 at every `wrong`-th place."""

    def __init__(self, word, symbols, wrong):
        super().__init__()
        self.word, self.symbols, self.wrong = word, symbols, wrong

    def cores(self):
        return []

    def forward(self, ids):
        following = ids.roll(-1, dims=1)
        following[:, self.word + 1 :: self.wrong] = 0
        return type("Output", (), {"logits": nn.functional.one_hot(following, self.symbols + 1).double()})


@pytest.mark.parametrize(("wrong", "share"), [(100, 11 / 12), (1, 0.0), (2, 0.5), (3, 8 / 12)])
def test_repeated_counts_the_symbols_of_the_second_word(wrong, share):
    assert repetition.repeated(Oracle(12, 5, wrong), word=12, symbols=5, batches=2, batch=3) == pytest.approx(share)


def test_weights_trained_with_some_rounds_fit_all_and_full_is_full_attention():
    """One chunk of the whole length: softmax over j < i of x_i . k_j, k_j = x_j / sqrt(d (mean(x_j^2) + 1e-6)); the
    first token sees itself."""
    sizes = {"word": 7, "symbols": 5, "chunk": 4, "dim": 8, "heads": 2}
    models = {rounds: repetition.repeater(rounds, **sizes) for rounds in ("full", "1", "2", "8")}
    for model in models.values():
        model.load_state_dict(models["full"].state_dict())
    core, x = next(iter(models["full"].cores())).double(), drawn(1, 2, 16, 4)
    keys = x / (4 * (x.square().mean(dim=-1, keepdim=True) + 1e-6)).sqrt()
    weights = np.tril(np.exp(np.einsum("bhid,bhjd->bhij", x.numpy(), keys.numpy())), -1)
    weights[:, :, 0, 0] = 1
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(patterns.attention_matrix(core, x).numpy(), weights, atol=1e-10)


def test_hashes_are_drawn_anew_with_every_batch():
    model = repetition.repeater("2", word=7, symbols=5, chunk=4)
    core, found = next(iter(model.cores())), []
    for _, batch in zip(range(3), repetition.stream(model, batch=2, word=7, symbols=5, seed=0), strict=False):
        found.append(core.rotations.clone())
        assert batch["input_ids"].shape == (2, 16)
    assert not any(torch.equal(found[i], found[j]) for i in range(3) for j in range(i))


@pytest.mark.parametrize("rounds", ["0", "many", "-1"])
def test_other_rounds_are_refused(rounds):
    with pytest.raises(OptionError, match="full"):
        repetition.repeater(rounds, word=7, symbols=5, chunk=4)


def test_a_model_that_does_not_hash_is_refused():
    model = effzoo.build("gpt2", layers=1, dim=8, heads=2, mlp=8, vocab=7, max_length=8)
    with pytest.raises(IncompatibleError, match="does not hash"):
        repetition.rehash(model, 0)
