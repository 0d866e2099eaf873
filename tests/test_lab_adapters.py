"""Analyses of adapters, prefixes and the unified view, and what adapters cost, each against its definition written
out."""

import itertools
from types import SimpleNamespace

import pytest
import torch

import effzoo
from effzoo.attention import Mask
from effzoo.errors import AdapterError, DataError, IncompatibleError, OptionError
from effzoo.lab.analyses import products, published
from effzoo.lab.analyses.adapter_cost import kept_bytes, mergeable, pass_operations, step_operations
from effzoo.lab.analyses.prefix_gate import prefix_gates
from effzoo.lab.analyses.spans import ablated, spans, without
from effzoo.lab.analyses.together import averaged, divided
from effzoo.lab.analyses.unified import TABLE, attached, described, difference
from effzoo.lab.fit import Examples
from effzoo.sites import sites

SIZES = {"dim": 12, "layers": 3, "heads": 3, "mlp": 20, "vocab": 53, "max_length": 16}
ROWS = {row.method: row for row in TABLE}
SPECS = {
    "prefix": "prefix[length=3, init=normal]", "houlsby": "houlsby[bottleneck=5, activation=relu]",
    "lora": "lora[rank=2, alpha=6]",
    "parallel": "parallel[bottleneck=5]", "multihead_parallel": "multihead_parallel[bottleneck=2]",
    "scaled_parallel": "scaled_parallel[bottleneck=5]",
}  # fmt: skip


def model(attention="full", seed=0, **options):
    torch.manual_seed(seed)
    given = {
        "task": "classification",
        "num_labels": 3,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pooling": "mean",
        **SIZES,
        **options,
    }
    return effzoo.build("bert", attention=attention, **given).double().eval()


def inputs(n=7, rows=3):
    """A batch of an odd length, one row padded."""
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, n, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(2, 53, (rows, n), generator=draw), "attention_mask": mask}


def labelled(n=7, rows=3):
    return {**inputs(n, rows), "labels": torch.arange(rows) % 3}


def shaken(built, spec, name="default", seed=3):
    """The model with an adapter none of whose tensors is 0."""
    torch.manual_seed(seed)
    effzoo.attach(built, spec, name=name)
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return built


# spans


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_spans_are_every_contiguous_run_of_layers(layers):
    contiguous = {
        chosen
        for size in range(1, layers + 1)
        for chosen in itertools.combinations(range(layers), size)
        if chosen[-1] - chosen[0] == size - 1
    }
    assert {tuple(range(first, last + 1)) for first, last in spans(layers)} == contiguous
    assert len(spans(layers)) == layers * (layers + 1) // 2


def test_spans_of_no_layers_are_refused():
    with pytest.raises(OptionError, match="1 layer or more"):
        spans(0)


@pytest.mark.parametrize("span", [(0, 0), (1, 2), (0, 2)])
def test_without_a_span_the_model_is_one_whose_adapter_never_was_in_those_layers(span):
    built = shaken(model(), "houlsby[bottleneck=4]")
    gone = range(span[0], span[1] + 1)
    with without(built, gone):
        removed = built(**inputs()).logits
    for _, site in sites(built):
        if site.layer in gone and "default" in site.adapters:
            del site.adapters["default"]
    torch.testing.assert_close(removed, built(**inputs()).logits, rtol=0, atol=0)


def test_after_without_the_adapter_acts_again_even_if_measuring_failed():
    built = shaken(model(), "houlsby[bottleneck=4]")
    whole = built(**inputs()).logits
    with pytest.raises(ZeroDivisionError), without(built, [1]):
        raise ZeroDivisionError
    torch.testing.assert_close(built(**inputs()).logits, whole, rtol=0, atol=0)


def test_without_keeps_another_adapter_and_its_order():
    built = shaken(shaken(model(), "houlsby[bottleneck=4]", "one"), "parallel[bottleneck=3]", "two", seed=4)
    effzoo.peft.activate(built, "one", "two")
    with without(built, range(3), "one"):
        left = built(**inputs()).last_hidden_state
    effzoo.peft.activate(built, "two")
    torch.testing.assert_close(left, built(**inputs()).last_hidden_state, rtol=0, atol=0)


def test_without_refuses_unknown_adapters_and_layers():
    built = shaken(model(), "houlsby[bottleneck=4, layers=(0, 2)]")
    with pytest.raises(AdapterError, match="no adapter 'task'"), without(built, [0], "task"):
        pass
    with pytest.raises(OptionError, match=r"nothing in layers \[1\]; it acts in \[0, 2\]"), without(built, [1]):
        pass


def test_ablated_measures_every_span_once():
    built = shaken(model(), "houlsby[bottleneck=4]")
    found = ablated(built, lambda: built(**inputs()).logits.sum().item(), 3)
    for (first, last), value in found.items():
        with without(built, range(first, last + 1)):
            assert value == built(**inputs()).logits.sum().item()
    assert list(found) == spans(3)


# gate of a prefix


def dense_gates(built, batch):
    """lambda of every layer from softmax weights over the concatenated keys, written out."""
    x, found = built.embeddings(batch["input_ids"], None, None, None, None, 0)[0], []
    valid = batch["attention_mask"].bool()
    for block in built.blocks:
        q, k = (linear(x).unflatten(-1, (3, 4)).transpose(1, 2) for linear in (block.attn.q, block.attn.k))
        keys, _ = next(block.attn.memory.hung()).pair()
        keys = torch.cat([keys.expand(len(x), -1, -1, -1), k], dim=2)
        scores = q @ keys.transpose(-1, -2) / 2
        length = keys.shape[2] - x.shape[1]
        scores[..., length:] = scores[..., length:].masked_fill(
            ~block.attn.core.pattern(x.shape[1], Mask(valid)), float("-inf")
        )
        found.append(scores.softmax(dim=-1)[..., :length].sum(dim=-1))
        x = block(x, Mask(valid))
    return found


@pytest.mark.parametrize("kind", ["full", "blockwise[blocks=2]", "local[chunk=4]"])
@pytest.mark.parametrize("length", [1, 5])
@torch.no_grad()
def test_gates_are_the_softmax_weights_on_the_prefix(length, kind):
    """Also where heads see different keys."""
    built = shaken(model(kind), f"prefix[length={length}, init=normal]")
    tokens = inputs()["attention_mask"].bool()
    for gate, dense in zip(prefix_gates(built, **inputs()), dense_gates(built, inputs()), strict=True):
        torch.testing.assert_close(gate.transpose(1, 2)[tokens], dense.transpose(1, 2)[tokens], rtol=0, atol=1e-12)


@torch.no_grad()
def test_gates_of_keys_that_are_all_zero_count_rows():
    """All logits equal: lambda = length / (length + tokens)."""
    built = shaken(model(), "prefix[length=3, init=normal]")
    for block in built.blocks:
        for parameter in (block.attn.q.weight, block.attn.q.bias):
            parameter.zero_()
    valid = inputs()["attention_mask"].sum(dim=1)
    for gate in prefix_gates(built, **inputs()):
        torch.testing.assert_close(gate, (3 / (3 + valid.double()))[:, None, None].expand_as(gate), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["local[chunk=4]", "linformer[k=4]", "lsh[chunk=4, rounds=2]"])
@torch.no_grad()
def test_gates_of_other_attention_are_shares(kind):
    built = shaken(model(kind), "prefix[length=3, init=normal]")
    for gate in prefix_gates(built, **inputs()):
        assert gate.shape == (3, 3, 7)
        of_tokens = gate.transpose(1, 2)[inputs()["attention_mask"].bool()]
        assert bool(((of_tokens > 0) & (of_tokens < 1)).all())


def test_gates_leave_the_model_as_it_was_and_are_of_layers_with_a_prefix():
    built = shaken(model(), "prefix[length=3, init=normal, layers=(0, 2)]").train()
    assert len(prefix_gates(built, **inputs())) == 2
    assert built.training
    assert all("attended" not in vars(core) for core in built.cores())


def test_gates_without_a_prefix_are_refused():
    with pytest.raises(IncompatibleError, match="no layer of this model has a prefix"):
        prefix_gates(model(), **inputs())
    for other in ("prefix[length=3, init=normal, softmax=own]", "multihead_parallel[bottleneck=2]"):
        with pytest.raises(IncompatibleError, match="no layer of this model has a prefix"):
            prefix_gates(shaken(model(), other), **inputs())


def test_gates_of_attention_in_several_softmaxes_are_refused():
    with pytest.raises(IncompatibleError, match="in one softmax"):
        is_global = torch.zeros(3, 7, dtype=torch.long).index_fill(1, torch.tensor([0]), 1)
        prefix_gates(
            shaken(model("longformer[window=4]"), "prefix[length=3, init=normal]"),
            **inputs(),
            global_attention_mask=is_global,
        )


# unified view


@pytest.mark.parametrize("method", list(SPECS))
def test_every_row_computes_what_its_method_computes(method):
    places = attached(shaken(model(), SPECS[method]), **inputs())
    assert len(places) == (6 if method in ("houlsby", "lora") else 3)
    found = difference(ROWS[method], places)
    assert found is not None and found < 1e-12


@pytest.mark.parametrize(
    ("row", "method"),
    [("prefix", "multihead_parallel"), ("parallel", "houlsby"), ("lora", "parallel"), ("parallel", "scaled_parallel")],
)
def test_another_row_does_not(row, method):
    found = difference(ROWS[row], attached(shaken(model(), SPECS[method]), **inputs()))
    assert found is not None and found > 1e-3


def test_the_row_of_a_prefix_is_attention_over_concatenated_keys():
    built = shaken(model(), SPECS["prefix"])
    with torch.no_grad():
        (place, *_) = attached(built, **inputs())
        block, valid = built.blocks[0], inputs()["attention_mask"].bool()
        q, k, v = (
            linear(place.x).unflatten(-1, (3, 4)).transpose(1, 2)
            for linear in (block.attn.q, block.attn.k, block.attn.v)
        )
        keys, values = next(block.attn.memory.hung()).pair()
        scores = q @ torch.cat([keys.expand(3, -1, -1, -1), k], dim=2).transpose(-1, -2) / 2
        scores[..., 3:] = scores[..., 3:].masked_fill(~valid[:, None, None], float("-inf"))
        dense = scores.softmax(dim=-1) @ torch.cat([values.expand(3, -1, -1, -1), v], dim=2)
        torch.testing.assert_close(described(ROWS["prefix"], place), dense, rtol=0, atol=1e-12)


def test_rows_that_cannot_be_computed_say_so():
    adapters = attached(shaken(model(), SPECS["parallel"]), **inputs())
    heads = attached(shaken(model(), SPECS["prefix"]), **inputs())
    with pytest.raises(IncompatibleError, match="is no attention"):
        described(ROWS["prefix"], adapters[0])
    with pytest.raises(IncompatibleError, match="the sequential z has 4"):
        described(ROWS["houlsby"], heads[0])
    assert difference(ROWS["prefix"], adapters) is None


def test_heads_are_not_read_from_other_attention():
    with pytest.raises(IncompatibleError, match="full, bidirectional attention"):
        attached(shaken(model("local[chunk=4]"), SPECS["prefix"]), **inputs())


# costs


class TwoLayers(torch.nn.Module):
    """Loss sum (W_2 W_1 x)^2."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 7, dtype=torch.float64), torch.nn.Linear(7, 3, dtype=torch.float64)

    def forward(self, x):
        return SimpleNamespace(loss=self.second(self.first(x)).square().sum())


def test_kept_bytes_are_what_backward_needs_without_weights_and_inputs():
    """The hidden units, for the gradient of W_2, and the outputs, for that of the square; nothing for frozen layers,
    whose loss has no gradient."""
    x = torch.randn(11, 5, dtype=torch.float64)
    assert kept_bytes(TwoLayers(), {"x": x}) == 11 * (7 + 3) * 8
    assert kept_bytes(TwoLayers().requires_grad_(False), {"x": x}) == 0


def test_kept_bytes_grow_with_the_batch_and_leave_the_mode():
    built = shaken(model(), "lora[rank=2]")
    one, two = kept_bytes(built, labelled(rows=3)), kept_bytes(built, labelled(rows=6))
    assert one < two <= 2 * one
    assert not built.training


def test_operations_of_two_layers_are_counted_as_by_hand():
    """Forward: the products, the squares and their sum. Backward: both gradients of W_2, that of W_1, and fewer
    entries of everything else."""
    x = torch.randn(11, 5, dtype=torch.float64)
    first, second = 2 * 11 * 5 * 7, 2 * 11 * 7 * 3
    forward = first + second + 11 * 3 + 1
    net = TwoLayers()
    assert pass_operations(net, {"x": x, "labels": x}) == forward
    rest = step_operations(net, {"x": x}) - forward - (first + 2 * second)
    assert 7 + 3 <= rest < 200
    assert net.first.weight.grad is None and net.training


def test_bottlenecks_add_their_operations_to_a_pass_and_merged_changes_add_none():
    """Two products, sigma and the sum at both sub-layers of each layer; the norms are as they were."""
    base, batch = pass_operations(model(), labelled()), labelled()
    dim, layers, tokens = SIZES["dim"], SIZES["layers"], batch["input_ids"].numel()
    each = 4 * tokens * dim * 5 + tokens * 5 + tokens * dim
    assert pass_operations(shaken(model(), "houlsby[bottleneck=5]"), batch) - base == 2 * layers * each
    low_rank = shaken(model(), "lora[rank=2]")
    assert pass_operations(low_rank, batch) > base
    assert pass_operations(effzoo.merge(low_rank, undo=False), batch) == base
    assert step_operations(shaken(model(), "full"), batch) > step_operations(shaken(model(), "lora[rank=2]"), batch)


@pytest.mark.parametrize(
    ("spec", "can"),
    [("lora[rank=2]", True), ("bitfit", True), ("ia3", True), ("prefix[length=2]", False), ("houlsby", False)],
)
def test_mergeable_says_whether_merging_succeeds(spec, can):
    built = shaken(model(), spec)
    assert mergeable(built, "default") is can
    if can:
        effzoo.merge(built)
    else:
        with pytest.raises(AdapterError):
            effzoo.merge(built)


# two adapters together


def test_the_mean_of_two_low_rank_changes_is_half_of_each_with_one_head():
    built = shaken(shaken(model(), "lora[rank=2]", "one"), "lora[rank=2]", "two", seed=5)
    changes = {name: effzoo.peft.delta(built, name) for name in ("one", "two")}
    with averaged(built, ("one", "two"), head="two"):
        together = built(**inputs()).logits
    plain = model()
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            share = (
                {name: 1.0 if name == "two" else 0.0 for name in changes}
                if key.startswith("head.")
                else dict.fromkeys(changes, 0.5)
            )
            for name, change in changes.items():
                if key in change:
                    parameter.add_(share[name] * change[key])
    torch.testing.assert_close(together, plain(**inputs()).logits, rtol=0, atol=1e-12)


def test_averaged_restores_what_was_active():
    built = shaken(shaken(model(), "lora[rank=2]", "one"), "lora[rank=2]", "two", seed=5)
    alone = built(**inputs()).logits
    with averaged(built, ("one", "two"), head="one"):
        pass
    torch.testing.assert_close(built(**inputs()).logits, alone, rtol=0, atol=0)


def test_divided_examples_keep_their_inputs_and_number_their_labels_anew():
    whole = Examples({"x": torch.arange(7.0)}, torch.tensor([0, 3, 2, 1, 4, 3, 0]))
    even, odd = divided(whole, [[0, 2, 4], [1, 3]])
    assert even.inputs["x"].tolist() == [0, 2, 4, 6] and even.labels.tolist() == [0, 1, 2, 0]
    assert odd.inputs["x"].tolist() == [1, 3, 5] and odd.labels.tolist() == [1, 0, 1]
    with pytest.raises(DataError, match="two labels or more"):
        divided(whole, [[0, 1, 2, 3], [4]])


# published tables, and what low rank costs


@pytest.mark.parametrize(
    ("table", "row", "count"),
    [  # by hand: L layers of width d
        (published.OF_GPT3, 2, 264 * 12288),
        (published.OF_GPT3, 6, 96 * 2 * 2 * 12288),  # A and B of q and v, rank 1
        (published.E2E, 4, 2 * (12 * 1024**2 + 13 * 1024)),
        (published.GLUE, 4, 12 * 2 * 2 * 768 * 8),
        (published.GLUE, 1, 12 * 11 * 768 + 768),  # 11 d of biases a layer, and the norm of the embeddings
        (published.GLUE, 10, 24 * 2 * (2 * 1024 * 8 + 8 + 1024)),
    ],
)
def test_counts_of_published_tables_are_the_closed_forms(table, row, count):
    assert published.counted(table.rows[row]) == count


def test_a_count_agrees_with_what_is_printed_to_its_last_figure():
    assert published.agrees(4_718_592, "4.7") == "yes" and published.agrees(4_718_592, "4.72") == "yes"
    assert published.agrees(3_171_840, "3.0") == "in 2^20" and published.agrees(393_216, "0.35") == "+12.3 %"
    assert published.counted(published.E2E.rows[1]) is None


def test_published_tables_are_whole_and_their_means_are_those_of_their_tasks():
    for table in published.TABLES:
        assert all(len(row.scores) == len(table.scores) for row in table.rows)
    for row in published.GLUE.rows:  # printed means differ from those of printed scores by what rounding does
        assert sum(row.scores[:8]) / 8 == pytest.approx(row.scores[8], abs=0.11), row.method


def test_the_orders_of_a_low_rank_product_cost_what_their_formulas_say():
    for n, d, r in ((3, 5, 2), (7, 4, 4), (1, 8, 1)):
        assert products.in_turn(n, d, r) == 4 * n * d * r
        assert products.product_first(n, d, r) == 2 * r * d**2 + 2 * n * d**2
