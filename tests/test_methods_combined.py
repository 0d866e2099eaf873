"""Combinations compute their paper's formulas, gates look at tokens alone, and unions of any methods add up."""

import copy
import itertools

import pytest
import torch
from support import labelled as batch
from support import module, small
from torch.nn import functional as F

import effzoo
from effzoo.attention import Mask
from effzoo.checks.models import TinyModel, logits
from effzoo.errors import IncompatibleError, IncompatiblePeft, OptionError
from effzoo.peft import training
from effzoo.peft.combined.s4 import group_of
from effzoo.sites import HookContext, sites

D, MLP, LAYERS, LABELS, VOCAB = 16, 32, 2, 3, 53
HEAD = D * LABELS + LABELS
KINDS = effzoo.attention.names()


def build(tiny, attention="full", peft=None, name="minilm", **more):
    """A classification model whose head is one linear layer, in float64, with every parameter (of the adapter too) away
    from its initial value."""
    model = effzoo.build(
        name, attention=attention, task="classification", num_labels=LABELS, pooling="mean", **{**tiny, **more}
    ).double()
    if peft:
        effzoo.attach(model, peft)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def found(model, **inputs):
    """The output and every gradient of a model that is trained."""
    model.train()
    out = model(**(inputs or batch()))
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.logits.detach(), gradients


def assert_same(one, other):
    assert torch.allclose(one[0], other[0], rtol=0, atol=1e-10) and one[1] and one[1].keys() == other[1].keys()
    assert all(torch.allclose(one[1][name], other[1][name], rtol=0, atol=1e-10) for name in one[1])


# --- UniPELT ---

UNIPELT = "unipelt[length=3, rank=4, bottleneck=5]"


def gate(linear, x, valid):
    """The mean of sigmoid(w x + b) over the tokens of each example, one example after the other."""
    rows = [(x[i] @ linear.weight[0] + linear.bias).sigmoid() for i in range(len(x))]
    return torch.stack([row[valid[i]].mean() for i, row in enumerate(rows)])


def test_unipelt_is_the_papers_three_gates_forward_and_backward(tiny):
    model = build(tiny, peft=UNIPELT)
    block, x = model.blocks[0], torch.randn(3, 9, D, dtype=torch.float64, requires_grad=True)
    attn, valid = block.attn, batch()["attention_mask"].bool()
    prefix = module(model, "blocks.0.attn.memory", "unipelt")
    loras = {name: module(model, f"blocks.0.attn.{name}", "unipelt") for name in "qv"}
    adapter = module(model, "blocks.0.mlp_branch", "unipelt")
    assert (
        loras["q"].gate is loras["v"].gate and loras["q"].gate is not module(model, "blocks.1.attn.q", "unipelt").gate
    )

    g_prefix, g_lora = gate(prefix.gate.linear, x, valid), gate(loras["q"].gate.linear, x, valid)
    q, k, v = (F.linear(x, getattr(attn, name).weight, getattr(attn, name).bias) for name in "qkv")
    q, v = (y + g_lora[:, None, None] * (x @ loras[name].A.T @ loras[name].B.T) for name, y in (("q", q), ("v", v)))
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
    keys, values = (g_prefix[:, None, None, None] * y for y in (prefix.prefix.keys, prefix.prefix.values))
    allowed = F.pad(valid, (3, 0), value=True)[:, None, None, :]
    heads = F.scaled_dot_product_attention(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), attn_mask=allowed)
    attended = F.linear(heads.transpose(1, 2).flatten(2), attn.o.weight, attn.o.bias)
    h = F.layer_norm(x + attended, (D,), block.attn_norm.weight, block.attn_norm.bias, block.attn_norm.eps)
    fed = F.linear(
        F.gelu(F.linear(h, block.mlp.up.weight, block.mlp.up.bias)), block.mlp.down.weight, block.mlp.down.bias
    )
    inner = F.linear(F.relu(F.linear(fed, adapter.down.weight, adapter.down.bias)), adapter.up.weight, adapter.up.bias)
    fed = fed + gate(adapter.gate.linear, h, valid)[:, None, None] * inner
    expected = F.layer_norm(h + fed, (D,), block.mlp_norm.weight, block.mlp_norm.bias, block.mlp_norm.eps)

    out = block(x, Mask(valid))
    assert torch.allclose(out, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(out) * valid[..., None]
    leaves = [x, *(p for p in block.parameters() if p.requires_grad)]
    for got, wanted in zip(*(torch.autograd.grad((y * weight).sum(), leaves) for y in (out, expected)), strict=True):
        assert torch.allclose(got, wanted, rtol=0, atol=1e-10)


# whose chunks depend on the length; the next test holds for it
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lsh"])
def test_gates_do_not_see_padding(tiny, kind):
    """Whatever stands there, and however much of it: every example computes what it computes alone."""
    attention = "perceiver[latents=4]" if kind == "perceiver" else small(kind)
    model, inputs = build(tiny, attention, UNIPELT), batch()
    out = model(**inputs).logits
    garbage = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 50)
    assert torch.allclose(
        model(input_ids=garbage, attention_mask=inputs["attention_mask"]).logits, out, rtol=0, atol=1e-10
    )
    alone = model(input_ids=inputs["input_ids"][1:2, :5]).logits
    assert torch.allclose(out[1:2], alone, rtol=0, atol=1e-10)


def test_garbage_at_padding_does_not_matter_in_lsh_either(tiny):
    model, inputs = build(tiny, small("lsh"), UNIPELT), batch()
    garbage = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 50)
    assert torch.allclose(
        model(input_ids=garbage, attention_mask=inputs["attention_mask"]).logits,
        model(**inputs).logits,
        rtol=0,
        atol=1e-10,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_computes_with_the_gates_of_its_own_layer_and_batch(tiny, kind):
    """The backward of one batch runs after the forward of another, with other padding."""
    plain = build(tiny, small(kind), UNIPELT)
    again = copy.deepcopy(plain)
    again.recompute = "blocks"
    other = {**batch(), "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    kept = []
    for model in (plain, again):
        model.train()
        first, second = model(**batch()), model(**other)
        (first.loss + second.loss).backward()
        kept.append(
            (first.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        )
    assert_same(*kept)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reversible_block_computes_back_with_the_right_gates(kind):
    from effzoo.blocks import reversible as module_

    case = TinyModel("bert", small(kind), choices=(("norm", "pre"), ("residual", "reversible")))
    model, results = effzoo.attach(case.model(), UNIPELT), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    results.append(found(model, **case.batch()))
    stored = module_.two_streams
    with pytest.MonkeyPatch.context() as patch:  # the same two streams, by autograd alone
        patch.setattr("effzoo.architectures.transformer.reversible", lambda blocks, x, mask: stored(blocks, x, mask))
        results.append(found(model, **case.batch()))
    assert_same(*results)


def test_linformer_projects_before_it_compresses_where_a_gate_looks(tiny):
    """W (E x) with a gate of E x would be another function: the gate must see the tokens."""
    model = build(tiny, "linformer[k=4]", UNIPELT, max_length=64)
    attn, x = model.blocks[0].attn, torch.randn(2, 9, D, dtype=torch.float64)
    attn.memories(HookContext(x=x, keys_values=attn.keys_values))
    assert torch.equal(attn.core.project("v", x, attn.v, Mask()), attn.v(x))


def test_a_model_copied_between_two_batches_keeps_nothing_of_the_other(tiny):
    model = build(tiny, peft=UNIPELT)
    out = model(**batch()).logits
    twin = copy.deepcopy(model)
    twin(input_ids=torch.randint(2, VOCAB, (1, 4)))
    assert torch.equal(model(**batch()).logits, out) and torch.equal(twin(**batch()).logits, out)
    pairs = [(module(m, "blocks.0.attn.v", "unipelt"), module(m, "blocks.0.attn.q", "unipelt")) for m in (model, twin)]
    assert pairs[1][0].gate is pairs[1][1].gate is not pairs[0][0].gate


def test_a_causal_language_model_is_refused_and_a_causal_classifier_is_not(tiny):
    sizes = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    with pytest.raises(IncompatiblePeft, match="predicted from later ones; use mam"):
        effzoo.build("gpt2", task="causal_lm", peft="unipelt", **sizes)
    effzoo.build("gpt2", task="classification", peft="unipelt", **sizes)


def test_gates_can_be_averaged_over_adapters_but_not_chosen_by_row(tiny):
    model = effzoo.attach(build(tiny, peft=UNIPELT), UNIPELT, name="second").eval()
    outs = []
    for names in (("default",), ("second",)):
        outs.append(effzoo.activate(model, *names)(**batch()).logits)
    both = effzoo.activate(model, "default", "second", combine="average")(**batch()).logits
    assert all(not torch.allclose(both, out, atol=1e-6) for out in outs)
    effzoo.activate(model, rows=["default", "second", "default"])
    with pytest.raises(IncompatibleError, match="prompt tokens that differ by example cannot be chosen by row"):
        model(**batch())


def test_deep_prompts_beside_unipelt_read_through_its_gated_lora(tiny):
    """Rows that belong to no example: their own gate is the mean over all of them."""
    model = build(tiny, peft="unipelt|deep_prompt[length=3]")
    rows = module(model, "blocks.0.attn.memory", "deep_prompt").tokens
    lora, attn = module(model, "blocks.0.attn.v", "unipelt"), model.blocks[0].attn
    own = (rows @ lora.gate.linear.weight[0] + lora.gate.linear.bias).sigmoid().mean()
    expected = F.linear(rows, attn.v.weight, attn.v.bias) + own * (rows @ lora.A.T @ lora.B.T)
    assert torch.allclose(
        attn.keys_values(rows)[1], expected.unflatten(-1, (2, -1)).transpose(0, 1), rtol=0, atol=1e-12
    )
    found(model)


# --- MAM ---


def test_mam_is_the_union_of_its_parts(tiny):
    """Bit by bit: a prefix, and a scaled parallel adapter beside the feed-forward."""
    one = build(tiny, peft="mam[length=3, form=flat, bottleneck=5, scale=2.5]")
    other = build(tiny, peft="prefix[length=3]|scaled_parallel[bottleneck=5, scale=2.5]")
    other.load_state_dict({key: value for key, value in one.state_dict().items() if ".mam." not in key}, strict=False)
    with torch.no_grad():
        for layer in range(LAYERS):
            for place, method in (("attn.memory", "prefix"), ("mlp_branch", "scaled_parallel")):
                own = module(one, f"blocks.{layer}.{place}", "mam")
                module(other, f"blocks.{layer}.{place}", method).load_state_dict(own.state_dict())
    assert torch.equal(one(**batch()).logits, other(**batch()).logits)
    block, x = one.blocks[0], torch.randn(5, D, dtype=torch.float64)
    own = module(one, "blocks.0.mlp_branch", "mam")
    inner = F.relu(x @ own.down.weight.T + own.down.bias) @ own.up.weight.T + own.up.bias
    assert torch.allclose(block.mlp_branch(x, block.mlp(x)), block.mlp(x) + 2.5 * inner, rtol=0, atol=1e-12)


@pytest.mark.parametrize("spec", ["mam[length=3, hidden=5, bottleneck=5]", "unipelt[length=3, form=mlp, hidden=5]"])
def test_the_network_of_the_prefix_is_dropped_and_the_output_stays_bit_by_bit(tiny, spec, tmp_path):
    model = build(tiny)
    base = copy.deepcopy(model)
    effzoo.attach(model, spec).eval()
    before, more = model(**batch()).logits, effzoo.account(model).stored
    effzoo.peft.finish(model)
    assert torch.equal(model(**batch()).logits, before)
    assert (
        effzoo.account(model).stored == more - (3 * D + D * 5 + 5) - LAYERS * (5 * 2 * D + 2 * D) + LAYERS * 3 * 2 * D
    )
    loaded = effzoo.load_adapter(base, effzoo.save_adapter(model, tmp_path))
    assert torch.equal(loaded(**batch()).logits, before)


@pytest.mark.parametrize("spec", ["mam[form=flat, init=activations]", "unipelt[init=activations]"])
def test_the_prefix_of_a_combination_starts_from_activations_too(tiny, spec):
    model = build(tiny)
    alone = effzoo.attach(copy.deepcopy(model), "prefix[length=10]")
    effzoo.attach(model, spec.replace("[", "[length=10, "))
    for each in (alone, model):
        effzoo.peft.calibrate(each, [batch()])
    one = module(model, "blocks.0.attn.memory", spec.partition("[")[0])
    other = module(alone, "blocks.0.attn.memory", "prefix")
    assert torch.equal(getattr(one, "prefix", one).keys, other.keys)


# --- S4 ---


@pytest.mark.parametrize(
    ("depth", "sizes"),
    [
        (1, (0, 0, 1, 0)),
        (2, (0, 1, 1, 0)),
        (3, (0, 1, 1, 1)),
        (4, (1, 1, 1, 1)),
        (6, (1, 2, 2, 1)),
        (12, (2, 4, 4, 2)),
        (24, (4, 8, 8, 4)),
    ],
)
def test_the_groups_of_s4_are_a_spindle(depth, sizes):
    groups = [group_of(layer, depth) for layer in range(depth)]
    assert groups == sorted(groups) and tuple(groups.count(group) for group in (1, 2, 3, 4)) == sizes


ADAPTER, LORA, PREFIX, BIASES = 2 * (2 * 3 * D + 3 + D), 2 * 2 * D * 2, 2 * 5 * D, 4 * D + D + MLP + D + D
S4_LAYER = {1: ADAPTER + LORA, 2: ADAPTER + PREFIX, 3: ADAPTER + PREFIX + BIASES, 4: PREFIX + BIASES + LORA}


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6])
def test_s4_trains_in_each_layer_what_its_group_has(tiny, depth):
    model = effzoo.build(
        "minilm",
        peft="s4[bottleneck=3, rank=2, length=5]",
        task="classification",
        num_labels=LABELS,
        **{**tiny, "layers": depth},
    )
    for layer in range(depth):
        hung = [s.adapters["default"] for _, s in sites(model) if s.layer == layer and "default" in s.adapters]
        assert sum(p.numel() for modules in hung for p in modules.parameters()) == S4_LAYER[group_of(layer, depth)]
    assert effzoo.account(model).trainable == sum(S4_LAYER[group_of(layer, depth)] for layer in range(depth)) + HEAD


def test_s4_computes_what_a_map_of_layers_to_unions_computes(tiny):
    tiny = {**tiny, "layers": 4}
    adapters, low = "houlsby[bottleneck=3, activation=relu, targets=(attn.branch, mlp.branch)]", "lora[rank=2]"
    flat = "prefix[length=5]"
    biases = "bitfit[targets=(attn.q, attn.k, attn.v, attn.o, attn.norm, mlp.*)]"
    union = {"0": f"{adapters}|{low}", "1": f"{adapters}|{flat}"}
    one = build(tiny, peft="s4[bottleneck=3, rank=2, length=5]")
    other = effzoo.attach(build(tiny), union).eval()
    effzoo.attach(other, {"2": f"{adapters}|{flat}|{biases}", "3": f"{flat}|{biases}|{low}"}, name="upper")
    effzoo.activate(other, "default", "upper")
    other.load_state_dict(
        {key: value for key, value in one.state_dict().items() if ".adapters." not in key}, strict=False
    )
    known = dict(sites(other))
    with torch.no_grad():
        for path, site in sites(one):
            for tensor, value in site.adapters["default"].named_parameters() if "default" in site.adapters else ():
                leaf = tensor.partition(".")[2]
                twins = [
                    m
                    for adapter in known[path].adapters.values()
                    for m in adapter.values()
                    if leaf in dict(m.named_parameters())
                ]
                assert twins, f"{path} has no {leaf}"
                for twin in twins:
                    dict(twin.named_parameters())[leaf].copy_(value)
    assert torch.allclose(one(**batch()).logits, other(**batch()).logits, rtol=0, atol=1e-12)


# --- counts, rates, options ---

GATES, TRUNK = D + 1, 3 * D + D * 5 + 5
COUNTS = [
    ("mam[length=3, form=flat, bottleneck=5]", "full", LAYERS * (2 * 3 * D + 2 * 5 * D + 5 + D)),
    ("mam[length=3, hidden=5, bottleneck=5]", "full", TRUNK + LAYERS * (5 * 2 * D + 2 * D + 2 * 5 * D + 5 + D)),
    (UNIPELT, "full", LAYERS * (3 * GATES + 2 * 3 * D + 2 * 2 * D * 4 + 2 * 5 * D + 5 + D)),
    (UNIPELT, "longformer[window=4]", LAYERS * (3 * GATES + 2 * 3 * D + 4 * 2 * D * 4 + 2 * 5 * D + 5 + D)),
    (
        UNIPELT.replace("length=3", "length=3, form=mlp, hidden=5"),
        "full",
        TRUNK + LAYERS * (5 * 2 * D + 2 * D + 3 * GATES + 4 * D * 4 + 2 * 5 * D + 5 + D),
    ),
]


@pytest.mark.parametrize(("spec", "attention", "count"), COUNTS)
def test_trainable_parameters_are_the_closed_form(tiny, spec, attention, count):
    account = effzoo.account(build(tiny, attention, spec))
    assert account.trainable == account.stored == count + HEAD and account.changed is None


def test_every_part_of_a_combination_has_a_rate_that_suits_it(tiny):
    """Keys and values ten times the rest; a wide adapter of MAM, whose output is scaled too, as much less."""
    cases = (
        ("mam[form=flat]", 1 / 8),
        ("mam", 1 / 8),
        ("mam[bottleneck=128]", 1 / 2),
        ("mam[bottleneck=16]", 1),
        ("unipelt", 1),
        ("s4", 1),
    )
    for spec, narrow in cases:
        model = build(tiny, peft=spec)
        method, rates = spec.partition("[")[0], training.learning_rates(model)
        own = {
            name.partition(f".{method}.")[2].removeprefix("prefix."): rate
            for name, rate in rates.items()
            if f".{method}." in name
        }
        for name, rate in own.items():
            factor = 10 if name in ("keys", "values") else narrow if name.startswith(("down", "up")) else 1
            assert rate == pytest.approx(1e-3 * factor), name


@pytest.mark.parametrize(
    "spec",
    ["mam[length=0]", "mam[bottleneck=0]", "unipelt[rank=0]", "unipelt[bottleneck=0]", "s4[rank=0]", "s4[length=0]"],
)
def test_sizes_below_one_are_refused(tiny, spec):
    with pytest.raises(OptionError, match="at least 1"):
        build(tiny, peft=spec)


# --- unions and maps of layers ---

PARTS = {
    "prefix[length=3]": lambda layers: layers * 2 * 3 * D,
    "lora[rank=2]": lambda layers: layers * 2 * 2 * D * 2,
    "houlsby[bottleneck=3]": lambda layers: layers * 2 * (2 * 3 * D + 3 + D + 2 * D),
    "ia3": lambda layers: layers * (2 * D + MLP),
    "llama_adapter[length=3, skip=0]": lambda layers: layers * (3 * D + 2),
}


@pytest.mark.parametrize(("one", "other"), [*itertools.permutations(PARTS, 2)])
def test_a_union_trains_the_sum_and_both_parts_act(tiny, one, other):
    model = build(tiny, peft=f"{one}|{other}")
    assert effzoo.account(model).trainable == PARTS[one](LAYERS) + PARTS[other](LAYERS) + HEAD
    out, gradients = found(model)
    for spec in (one, other):
        name = spec.partition("[")[0]
        assert all(g.abs().max() > 0 for key, g in gradients.items() if f".{name}." in key)
        silent = copy.deepcopy(model)
        for _, site in sites(silent):
            if "default" in site.adapters and name in site.adapters["default"]:
                del site.adapters["default"][name]
        assert not torch.allclose(silent.eval()(**batch()).logits, out, atol=1e-6)


MAPS = [
    ("prefix[length=3]@0|lora[rank=2]@1", {"0": ["prefix[length=3]"], "1": ["lora[rank=2]"]}),
    ({"0": "lora[rank=2]|prefix[length=3]", "1-3": "ia3"}, {"0": ["lora[rank=2]", "prefix[length=3]"], "1-3": ["ia3"]}),
    ("prefix[length=3]@0-1|lora[rank=2]@2-3", {"0-1": ["prefix[length=3]"], "2-3": ["lora[rank=2]"]}),
    (
        {"0+2": "ia3|lora[rank=2]", "1+3": "llama_adapter[length=3, skip=0]"},
        {"0+2": ["ia3", "lora[rank=2]"], "1+3": ["llama_adapter[length=3, skip=0]"]},
    ),
]


def layers_of(said):
    found = []
    for part in said.split("+"):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


@pytest.mark.parametrize(("spec", "parts"), MAPS)
def test_a_map_of_layers_hangs_each_method_there_alone_and_all_of_them_act(tiny, spec, parts):
    model = build({**tiny, "layers": 4}, peft=spec)
    assert effzoo.account(model).trainable == HEAD + sum(
        PARTS[each](len(layers_of(said))) for said, union in parts.items() for each in union
    )
    _, gradients = found(model)
    for said, union in parts.items():
        for each in union:
            name = each.partition("[")[0]
            hung = {
                site.layer
                for _, site in sites(model)
                if "default" in site.adapters and name in site.adapters["default"]
            }
            assert hung == {*layers_of(said)}
            assert all(g.abs().max() > 0 for key, g in gradients.items() if f".{name}." in key)


@pytest.mark.parametrize("kind", ["full", "longformer[window=4]", "lsh[chunk=8]", "linformer[k=8]"])
def test_a_map_of_layers_merges_where_its_methods_do(tiny, kind):
    model = build(
        {**tiny, "layers": 4}, kind, {"0-1": "lora[rank=2]|ia3[targets=(attn.v*, mlp.down)]", "2-3": "bitfit"}
    )
    before = model(**batch()).logits
    assert effzoo.account(model).changed is not None
    effzoo.merge(model)
    assert not effzoo.attached(model) and torch.allclose(model(**batch()).logits, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "spec",
    [
        "mam[form=flat]|lora[targets=attn.o]",
        "unipelt|ia3[targets=attn.k]",
        "s4|lora[targets=attn.o]",
        "prompt[length=3]|mam[form=flat]",
    ],
)
@pytest.mark.parametrize("kind", ["full", "longformer[window=8]"])
def test_combinations_stand_in_unions_and_survive_a_file(spec, kind, tmp_path):
    case = TinyModel("bert", kind, has_global=kind != "full")
    model = effzoo.attach(case.model(), spec)
    found(model, **case.batch())
    loaded = effzoo.load_adapter(case.model(), effzoo.save_adapter(model, tmp_path))
    assert torch.equal(logits(loaded, case.batch()), logits(model, case.batch()))
