"""Methods of input composition compute their paper's formula, and a memory means the same in every attention kind."""

import copy
import json
import math

import pytest
import safetensors.torch
import torch
from support import labelled as batch
from support import module, small
from torch.nn import functional as F

import effzoo
from effzoo.attention import Cache, Mask
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.subject import BATCH, HEADS, WIDTH, cut, draw, gradients, live, masks, some_memory
from effzoo.errors import IncompatibleError, InputError, OptionError
from effzoo.peft import training
from effzoo.peft.input import fit_subspace
from effzoo.peft.input.ipt import PromptDecoder
from effzoo.peft.stored import stored_tensors
from effzoo.sites import HookContext, sites

D, LAYERS, LABELS, VOCAB = 16, 2, 3, 53
HEAD = D * LABELS + LABELS
KINDS = effzoo.attention.names()


def build(tiny, attention="full", peft=None, name="minilm", **more):
    """A classification model whose head is one linear layer, in float64, with every parameter away from its initial
    value."""
    model = effzoo.build(
        name, attention=attention, task="classification", num_labels=LABELS, pooling="mean", **{**tiny, **more}
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return (effzoo.attach(model, peft) if peft else model).eval()


def train(model, steps=3, stage=None):
    if stage is not None:
        training.begin(model, stage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        training.loss(model, **batch()).backward()
        optimizer.step()
    return model


# --- prompts ---


@pytest.mark.parametrize(("ids", "length"), [((7, 8, 9, 10, 11), 3), ((7, 8), 5), ((4,), 1)])
@pytest.mark.parametrize("attention", ["full", "local[chunk=4]", "linformer[k=8]"])
def test_a_prompt_of_text_computes_what_these_tokens_in_front_compute(tiny, attention, ids, length):
    bare = build(tiny, attention)
    model = effzoo.attach(copy.deepcopy(bare), f"prompt[length={length}, init=text, ids=({', '.join(map(str, ids))},)]")
    repeated = torch.tensor([ids[i % len(ids)] for i in range(length)]).expand(3, -1)
    inputs = batch()
    longer = bare(
        input_ids=torch.cat([repeated, inputs["input_ids"]], 1),
        attention_mask=F.pad(inputs["attention_mask"], (length, 0), value=1),
    ).last_hidden_state[:, length:]
    assert torch.allclose(model(**inputs).last_hidden_state, longer, rtol=0, atol=1e-12)


def test_prompt_rows_start_as_asked_for(tiny):
    model = build(tiny, peft="prompt[length=6]")
    table = model.embeddings.token.weight
    assert all((row == table).all(dim=1).any() for row in module(model, "embeddings.token", "prompt").tokens)
    rows = module(
        build({**tiny, "dim": 64}, peft="prompt[length=40, init=normal]"), "embeddings.token", "prompt"
    ).tokens
    assert 0.8 < rows.std() / build({**tiny, "dim": 64}).embeddings.token.weight.std() < 1.25


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("prompt[init=text]", "ids are the tokens of init='text'"),
        ("prompt[ids=(1, 2)]", "needed there; got init='vocabulary' and 2 ids"),
        ("prompt[init=text, ids=(1, 53)]", r"ids are in \[0, 53\), got 1 to 53"),
        ("prompt[length=0]", "length is at least 1"),
        ("p_tuning[hidden=0]", "hidden is at least 1"),
        ("ipt[dim=0]", "dim is at least 1"),
        ("ipt[subspace=1.0]", r"in \[0, 1\), got 1.0"),
        ("prefix[length=0]", "length is at least 1, got 0"),
        ("prefix[hidden=0]", "hidden is at least 1, got 0"),
        ("prefix[std=-1.0]", "std is 0 or more"),
        ("prefix[form=mlp, init=activations]", "give form='flat', or leave init out"),
        ("deep_prompt[std=-1.0]", "std is 0 or more"),
        ("llama_adapter[skip=-1]", "skip is 0 or more"),
    ],
)
def test_bad_options_are_refused_with_a_sentence(tiny, spec, words):
    with pytest.raises(OptionError, match=words):
        build(tiny, peft=spec)


def lstm(x, cell, suffix):
    """One direction of one layer, written out: i, f, g, o = W x + b + U h + c."""
    h = c = x.new_zeros(cell.hidden_size)
    rows = []
    for row in x:
        gates = sum(getattr(cell, f"{name}_{suffix}") for name in ("bias_ih", "bias_hh"))
        gates = gates + getattr(cell, f"weight_ih_{suffix}") @ row + getattr(cell, f"weight_hh_{suffix}") @ h
        i, f, g, o = gates.chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        rows.append(h)
    return torch.stack(rows)


def test_p_tuning_rows_are_those_of_the_perceptron_or_the_recurrent_network(tiny):
    network = module(build(tiny, peft="p_tuning[length=4, hidden=5]"), "embeddings.token", "p_tuning").network
    one, two, three = network.layers[0], network.layers[2], network.layers[4]
    hidden = F.relu(F.relu(network.start @ one.weight.T + one.bias) @ two.weight.T + two.bias)
    assert torch.allclose(network(), hidden @ three.weight.T + three.bias, atol=1e-12)

    network = module(
        build(tiny, peft="p_tuning[length=4, hidden=5, encoder=lstm]"), "embeddings.token", "p_tuning"
    ).network
    x = network.start
    for layer in range(2):
        back = lstm(x.flip(0), network.lstm, f"l{layer}_reverse").flip(0)
        x = torch.cat([lstm(x, network.lstm, f"l{layer}"), back], dim=1)
    one, two = network.layers[0], network.layers[2]
    assert torch.allclose(network(), F.relu(x @ one.weight.T + one.bias) @ two.weight.T + two.bias, atol=1e-12)


DROPPED = [
    "p_tuning[length=4, hidden=5]",
    "p_tuning[length=4, hidden=5, encoder=lstm]",
    "ipt[dim=3, length=4, hidden=5]",
    "prefix[length=4, form=mlp, hidden=5]",
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("spec", DROPPED)
def test_what_only_training_needs_is_dropped_and_the_output_stays_bit_by_bit(tiny, spec, dtype, tmp_path):
    model = build(tiny).to(dtype)
    base = copy.deepcopy(model)
    effzoo.attach(model, spec)
    train(model).eval()
    inputs = batch()
    before = model(**inputs).logits
    during = effzoo.load_adapter(copy.deepcopy(base), effzoo.save_adapter(model, tmp_path / "during"))
    assert torch.equal(during(**inputs).logits, before)
    effzoo.peft.finish(model)
    assert torch.equal(model(**inputs).logits, before)
    flat = "prefix" in spec
    numbers = LAYERS * 2 * 4 * D if flat else 4 * D
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == effzoo.account(model).stored == numbers + HEAD
    )
    folder = effzoo.save_adapter(model, tmp_path / "after")
    held = safetensors.torch.load_file(folder / json.loads((folder / "adapter.json").read_text())["tensors"])
    names = {key.rpartition(".")[2] for key in held if ".head." not in f".{key}"}
    assert (
        names == ({"keys", "values"} if flat else {"tokens"})
        and sum(x.numel() for x in held.values()) == numbers + HEAD
    )
    loaded = effzoo.load_adapter(copy.deepcopy(base), folder)
    assert torch.equal(loaded(**inputs).logits, before)
    train(loaded, steps=1).eval()  # and goes on learning
    assert not torch.equal(loaded(**inputs).logits, before)


def test_an_intrinsic_prompt_decodes_z_and_its_last_stage_moves_z_alone(tiny):
    model = build(tiny, peft="ipt[dim=3, length=4, hidden=5, subspace=0.25]")
    network = module(model, "embeddings.token", "ipt").network
    decoder = network.decoder
    hidden = torch.tanh(decoder.inner.weight @ network.z + decoder.inner.bias)
    rows = (decoder.outer.weight @ hidden + decoder.outer.bias).reshape(4, D)
    assert torch.allclose(network(), rows, atol=1e-12)
    subspace, intrinsic = training.stages(model)
    assert [(s.name, s.share) for s in (subspace, intrinsic)] == [("subspace", 0.25), ("intrinsic", 0.75)]

    def moved(stage):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        train(model, stage=stage)
        return {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}

    assert moved(subspace) == {name for name, _ in network.named_parameters()}
    effzoo.peft.activate(model, "default")  # sets every requires_grad
    assert moved(intrinsic) == {"z"}
    assert training.stages(build(tiny, peft="ipt[subspace=0.0]"))[0].name == "intrinsic"


def test_a_subspace_is_fitted_to_prompts_that_lie_in_one_and_depends_on_its_seed_alone():
    torch.manual_seed(5)
    truth, codes = PromptDecoder(2, 4, 3, 5).double(), torch.randn(12, 2, dtype=torch.float64)
    prompts = truth(codes).detach()
    state = torch.get_rng_state()
    decoder, found = fit_subspace(prompts, dim=2, hidden=16, steps=1500)
    assert torch.equal(state, torch.get_rng_state()) and found.shape == (12, 2)
    left = (decoder(found) - prompts).square().mean() / (prompts - prompts.mean(0)).square().mean()
    assert left < 0.01  # of the variance: the 15 numbers of a prompt are told by two
    again, _ = fit_subspace(prompts, dim=2, hidden=16, steps=1500)
    assert all(torch.equal(x, y) for x, y in zip(decoder.parameters(), again.parameters(), strict=True))
    with pytest.raises(InputError, match="tasks, length, width"):
        fit_subspace(prompts[0])


def test_a_fitted_decoder_can_be_loaded_and_used(tiny):
    model = build(tiny, peft="ipt[dim=2, length=4, hidden=6, subspace=0.0]")
    decoder, codes = fit_subspace(torch.randn(5, 4, D, dtype=torch.float64), dim=2, hidden=6, steps=5)
    network = module(model, "embeddings.token", "ipt").network
    network.decoder.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        network.z.copy_(codes[3])
    assert torch.equal(module(model, "embeddings.token", "ipt").prompt(), decoder(codes[3]))


# --- keys and values ---


def test_reparametrised_keys_and_values_are_two_layers_that_share_the_first(tiny):
    model = build(tiny, peft="prefix[length=3, form=mlp, hidden=5]")
    first, second = (module(model, f"blocks.{layer}.attn.memory", "prefix") for layer in range(2))
    assert first.trunk is second.trunk and first.last is not second.last
    hidden = torch.tanh(first.trunk.rows @ first.trunk.linear.weight.T + first.trunk.linear.bias)
    for each in (first, second):
        # of each head: keys, then values
        both = (hidden @ each.last.weight.T + each.last.bias).reshape(3, 2, D).transpose(0, 1)
        keys, values = each.pair()
        assert torch.allclose(keys, both[..., : D // 2], atol=1e-12) and torch.allclose(
            values, both[..., D // 2 :], atol=1e-12
        )


@pytest.mark.parametrize("name", ["minilm", "gpt2", "llama"])
@pytest.mark.parametrize(("length", "method"), [(4, "prefix"), (12, "prefix"), (31, "prefix"), (6, "deep_prompt")])
def test_activations_are_what_the_base_makes_of_the_first_tokens(tiny, name, length, method):
    """31 rows of the 23 tokens that are there: they begin anew. Padding is no token."""
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    more = {"kv_heads": 1} if name.startswith("llama") else {}
    model = effzoo.build(name, task="classification", num_labels=LABELS, **kept, **more).double().eval()
    inputs, seen = batch(), {}

    def look(attn, given):
        seen[attn] = given[0]

    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    effzoo.attach(model, f"{method}[length={length}, init=activations]")
    effzoo.peft.calibrate(model, [inputs])
    places = torch.arange(length) % 23
    for block in model.blocks:
        rows = seen[block.attn][inputs["attention_mask"].bool()][places]
        own = block.attn.memory.adapters["default"][method]
        if method == "deep_prompt":
            assert torch.allclose(own.tokens, rows, rtol=0, atol=1e-12)
            continue
        for got, linear in ((own.keys, block.attn.k), (own.values, block.attn.v)):
            heads = F.linear(rows, linear.weight, linear.bias).unflatten(-1, (-1, D // 2)).transpose(0, 1)
            assert torch.allclose(got, heads, rtol=0, atol=1e-12)


def test_grouped_keys_start_as_the_mean_of_projections_that_are_not_grouped(tiny):
    """LSH compares with qk, which cannot be grouped; its memory has a key for each group of queries."""
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    model = effzoo.build(
        "llama",
        attention="lsh[chunk=8]",
        kv_heads=1,
        peft="prefix[length=3]",
        task="classification",
        num_labels=LABELS,
        **kept,
    ).double()
    effzoo.peft.calibrate(model, [batch()])
    own, attn = module(model, "blocks.0.attn.memory", "prefix"), model.blocks[0].attn
    x = model.blocks[0].attn_norm(model.embeddings(batch()["input_ids"])[0])[0, :3]
    assert torch.allclose(
        own.keys[0], attn.qk(x).unflatten(-1, (2, -1)).mean(dim=1), atol=1e-12
    ) and own.keys.shape == (1, 3, D // 2)


@pytest.mark.parametrize("attention", ["full", "longformer[window=6]", "local[chunk=4]", "lsh[chunk=4, stable=true]"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoding_with_a_cache_computes_the_same(tiny, name, attention):
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    more = {"kv_heads": 2} if name == "llama" else {}
    spec = "deep_prompt[length=3]|llama_adapter[length=2, skip=0]|prefix[length=2, softmax=own]|ipt[length=2]"
    model = effzoo.build(name, attention=attention, task="causal_lm", peft=spec, **kept, **more).double().eval()
    for key, parameter in model.named_parameters():
        if key.endswith("gate"):
            torch.nn.init.ones_(parameter)
    ids, cache = batch(12)["input_ids"], Cache()
    parts = [
        model(input_ids=ids[:, start:stop], cache=cache).logits for start, stop in ((0, 5), (5, 6), (6, 10), (10, 12))
    ]
    assert torch.allclose(torch.cat(parts, dim=1), model(input_ids=ids).logits, rtol=0, atol=1e-10)


def test_activations_need_data_and_leave_the_module_as_before_when_the_model_fails(tiny):
    model = build(tiny, peft="prefix[init=activations]")
    with pytest.raises(IncompatibleError, match="there is none"):
        effzoo.peft.calibrate(model, [])
    with pytest.raises(InputError):
        effzoo.peft.calibrate(model, [{"input_ids": torch.zeros(1, 1000, dtype=torch.long)}])
    assert module(model, "blocks.0.attn.memory", "prefix").collected is None


@pytest.mark.parametrize("attention", ["full", "blockwise", "longformer[window=2]", "local[chunk=2]"])
@pytest.mark.parametrize("name", ["minilm", "llama"])
def test_a_prefix_with_its_own_softmax_is_added_gated(tiny, name, attention):
    """W_o [heads + tanh(g) softmax(q P_k^T / sqrt(d)) P_v], with one gate for each query head; nothing at the start."""
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    more = {"kv_heads": 1} if name.startswith("llama") else {}
    model = effzoo.build(name, attention=attention, **kept, **more).double().eval()
    x = torch.randn(2, 7, D, dtype=torch.float64)
    attn, mask = model.blocks[0].attn, Mask(position_ids=torch.arange(7)[None])
    bare = attn(x, mask)
    effzoo.attach(model, "prefix[length=3, softmax=own]")
    assert torch.equal(attn(x, mask), bare)
    own = attn.memory.adapters["default"]["prefix"]
    torch.nn.init.normal_(own.gate)
    q = attn.project("q", x, mask)
    weights = (q @ own.keys.transpose(-1, -2) / math.sqrt(D // 2)).softmax(-1)
    added = own.gate.tanh()[:, None, None] * (weights @ own.values)
    expected = bare + F.linear(added.transpose(1, 2).flatten(2), attn.o.weight)
    assert torch.allclose(attn(x, mask), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["minilm", "gpt2", "llama"])
@pytest.mark.parametrize("skip", [0, 1])
def test_llama_adapter_is_gated_attention_to_projected_rows(tiny, name, skip):
    """W_o [heads + tanh(g) softmax(q (p W_k)^T / sqrt(d)) p W_v]; keys of the rows are not turned."""
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    more = {"kv_heads": 1} if name.startswith("llama") else {}
    model = effzoo.build(name, **kept, **more).double().eval()
    x = torch.randn(2, 7, D, dtype=torch.float64)
    attn, mask = model.blocks[1].attn, Mask(position_ids=torch.arange(7)[None])
    bare = attn(x, mask)
    effzoo.attach(model, f"llama_adapter[length=3, skip={skip}]")
    assert torch.equal(attn(x, mask), bare)
    own = attn.memory.adapters["default"]["llama_adapter"]
    assert own.gate.shape == (2,) and own.tokens.shape == (3, D)
    torch.nn.init.normal_(own.gate)
    q = attn.project("q", x, mask)
    keys, values = (
        F.linear(own.tokens, linear.weight, linear.bias).unflatten(-1, (-1, D // 2)).transpose(0, 1)
        for linear in (attn.k, attn.v)
    )
    added = own.gate.tanh()[:, None, None] * ((q @ keys.transpose(-1, -2) / math.sqrt(D // 2)).softmax(-1) @ values)
    expected = bare + F.linear(added.transpose(1, 2).flatten(2), attn.o.weight)
    assert torch.allclose(attn(x, mask), expected, rtol=0, atol=1e-12)
    assert ("default" in model.blocks[0].attn.memory.adapters) == (skip == 0)


@pytest.mark.parametrize(
    ("depth", "options", "layers"),
    [(5, "", [2, 3, 4]), (2, "", [1]), (1, "", [0]), (4, "[skip=0]", [0, 1, 2, 3]), (4, "@0+3", [0, 3])],
)
def test_llama_adapter_leaves_the_lowest_layers_out(tiny, depth, options, layers):
    model = build({**tiny, "layers": depth}, peft=f"llama_adapter{options}")
    assert [
        site.layer for _, site in sites(model) if site.role == "attn.memory" and "default" in site.adapters
    ] == layers


def test_a_closed_gate_stops_the_rows_gradient_and_the_gate_opens_it(tiny):
    model = build(tiny, peft="llama_adapter[skip=0]")
    own = module(model, "blocks.0.attn.memory", "llama_adapter")
    model(**batch()).loss.backward()
    assert own.gate.grad.abs().max() > 0 and own.tokens.grad.abs().max() == 0
    torch.nn.init.ones_(own.gate)
    model(**batch()).loss.backward()
    assert own.tokens.grad.abs().max() > 0


CASES = [("minilm", kind) for kind in KINDS] + [
    ("llama", kind) for kind in KINDS if not effzoo.attention.get(kind).not_causal
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_deep_prompts_are_a_prefix_of_the_layers_own_keys_and_values(tiny, kind, name):
    """Forward and, through W_k and W_v, backward: dL/dp = dL/dP_k W_k + dL/dP_v W_v."""
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    more = {"kv_heads": 1} if name == "llama" and "k" in effzoo.attention.get(kind).projections else {"kv_heads": 2}
    base = (
        effzoo.build(name, attention=small(kind), task="classification", num_labels=LABELS, **kept, **more)
        .double()
        .eval()
    )
    for site in (
        site for _, site in sites(base) if site.role in ("attn.k", "attn.v", "attn.qk") and site.bias is not None
    ):
        torch.nn.init.normal_(site.bias)
    deep, flat = effzoo.attach(copy.deepcopy(base), "deep_prompt[length=3]"), effzoo.attach(base, "prefix[length=3]")
    pairs = []
    for one, other in zip(deep.blocks, flat.blocks, strict=True):
        prompt = one.attn.memory.adapters["default"]["deep_prompt"].tokens
        prefix = other.attn.memory.adapters["default"]["prefix"]
        linears = (one.attn.qk if kind == "lsh" else one.attn.k, one.attn.v)
        with torch.no_grad():
            for target, linear in zip((prefix.keys, prefix.values), linears, strict=True):
                target.copy_(F.linear(prompt, linear.weight, linear.bias).unflatten(-1, (-1, D // 2)).transpose(0, 1))
        pairs.append((prompt, prefix, linears))
    outs = [model(**batch()) for model in (deep, flat)]
    assert torch.allclose(outs[0].logits, outs[1].logits, rtol=0, atol=1e-10)
    for out in outs:
        out.loss.backward()
    for prompt, prefix, linears in pairs:
        expected = sum(
            x.grad.transpose(0, 1).flatten(1) @ linear.weight
            for x, linear in zip((prefix.keys, prefix.values), linears, strict=True)
        )
        assert prompt.grad.abs().max() > 0 and torch.allclose(prompt.grad, expected, rtol=0, atol=1e-10)


def test_lora_on_the_projections_acts_on_deep_prompts_too(tiny):
    model = build(tiny, peft="lora[targets=(attn.k, attn.v)]|deep_prompt[length=3]")
    lora = module(model, "blocks.0.attn.k", "lora")
    torch.nn.init.normal_(lora.B)
    attn, rows = model.blocks[0].attn, module(model, "blocks.0.attn.memory", "deep_prompt").tokens
    (keys, _), _ = attn.memory(HookContext(x=torch.zeros(1, 1, D, dtype=torch.float64), keys_values=attn.keys_values))
    weight = attn.k.weight + lora.scale * lora.B @ lora.A
    assert torch.allclose(keys, F.linear(rows, weight, attn.k.bias).unflatten(-1, (2, -1)).transpose(0, 1), atol=1e-12)


# --- what a memory means, in every kind ---


def memories(rows=3):
    """One memory for all examples, and one for each of them."""
    keys, values = torch.randn(
        2, BATCH, HEADS, rows, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    return {"shared": some_memory(rows), "by example": (keys.requires_grad_(), values.requires_grad_())}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["shared", "by example"])
def test_memory_equals_the_dense_definition_forward_and_backward(kind, which):
    subject = Kind.of(kind)
    for direction, core in subject.cores():
        for n in (1, 7, 31):
            for where, given in masks(core, n):
                inputs, memory = draw(core, n, Mask(**given)), memories()[which]
                out, expected = (f(*inputs, mask=Mask(**given), memory=memory) for f in (core, core.dense))
                said = f"{direction}{where}, n = {n}"
                assert torch.allclose(out, expected, rtol=0, atol=1e-10), said
                leaves = [*live(inputs), *memory]
                for got, wanted in zip(gradients(out, leaves), gradients(expected, leaves), strict=True):
                    assert torch.allclose(got, wanted, rtol=0, atol=1e-10), said


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_by_example_equals_every_example_alone(kind):
    for direction, core in Kind.of(kind).cores():
        for n in (5, 31):
            for where, given in masks(core, n):
                inputs, memory = draw(core, n, Mask(**given)), memories()["by example"]
                out = core(*inputs, mask=Mask(**given), memory=memory)
                alone = [
                    core(
                        *cut(inputs, slice(row, row + 1)),
                        mask=Mask(**{key: value[row : row + 1] for key, value in given.items()}),
                        memory=(memory[0][row], memory[1][row]),
                    )
                    for row in range(BATCH)
                ]  # fmt: skip
                leaves, together = [*live(inputs), *memory], torch.cat(alone)
                assert torch.allclose(out, together, rtol=0, atol=1e-10), f"{direction}{where}, n = {n}"
                for got, wanted in zip(gradients(out, leaves), gradients(together, leaves), strict=True):
                    assert torch.allclose(got, wanted, rtol=0, atol=1e-10), f"{direction}{where}, n = {n}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_query_sees_every_row_of_the_memory(kind):
    """Global and local ones, in every chunk and block, whatever else they see."""
    for _, core in Kind.of(kind).cores():
        for where, given in masks(core, 31):
            inputs, memory = draw(core, 31, Mask(**given)), memories()["by example"]
            out = core(*inputs, mask=Mask(**given), memory=memory)
            tokens = given.get("valid", torch.ones(BATCH, 31, dtype=torch.bool))
            for row, head, place in [(0, 0, 0), (1, 1, 3), (0, 1, 15), (2, 0, 29)]:
                if tokens[row, place]:
                    found = torch.autograd.grad(out[row, head, place].sum(), memory[1], retain_graph=True)[0]
                    assert (found[row, head].abs() > 1e-12).all() and found.count_nonzero() == found[
                        row, head
                    ].numel(), where


@pytest.mark.parametrize("kind", [kind for kind in KINDS if Kind.of(kind).has_pattern])
def test_a_prefix_is_the_gated_sum_of_two_attentions_under_every_pattern(kind):
    """(1 - lambda(x)) Attn(q, K, V) + lambda(x) Attn(q, P_k, P_v), lambda the softmax mass of the prefix (He et al.
    2022, eq. 5)."""
    for _, core in Kind.of(kind).cores():
        n = 31
        q, k, v, *_ = draw(core, n, Mask())
        inputs, (keys, values) = [q, k, v][: len(core.uses(Mask()))], some_memory()
        inputs += [None] * (len(core.projections) - len(inputs))
        seen_at = getattr(core, "seen_at", None)  # how often a key counts, of kinds where that may be several times
        counts = core.pattern(n, Mask()) if seen_at is None else seen_at(torch.arange(n)[None], n, Mask())
        own = ((q @ k.transpose(-1, -2) / math.sqrt(WIDTH)).exp() * counts).sum(-1, keepdim=True)
        prefix = (q @ keys.transpose(-1, -2) / math.sqrt(WIDTH)).exp().sum(-1, keepdim=True)
        gate = prefix / (prefix + own)
        alone = core.attend_memory(*inputs, mask=Mask(), memory=(keys, values))
        expected = (1 - gate) * core(*inputs, mask=Mask()) + gate * alone
        assert torch.allclose(core(*inputs, mask=Mask(), memory=(keys, values)), expected, rtol=0, atol=1e-10)


def test_a_prefix_is_concatenated_keys_and_values_in_full_attention(tiny):
    model = build(tiny, peft="prefix[length=3, std=1.0]")
    attn, x = model.blocks[0].attn, torch.randn(2, 5, D, dtype=torch.float64)
    (keys, values), _ = attn.memory(HookContext(x=x, keys_values=attn.keys_values))
    q, k, v = (attn.project(name, x, Mask()) for name in "qkv")
    heads = F.scaled_dot_product_attention(
        q, torch.cat([keys.expand(2, -1, -1, -1), k], 2), torch.cat([values.expand(2, -1, -1, -1), v], 2)
    )
    assert torch.allclose(attn(x, Mask()), attn.o(heads.transpose(1, 2).flatten(2)), rtol=0, atol=1e-12)


def test_prompts_in_longformer_are_global_and_shift_the_global_tokens(tiny):
    """Equal to the rows written into the input, with global attention there and at the given tokens `length` places
    on."""
    bare = build(tiny, "longformer[window=2]")
    model = effzoo.attach(copy.deepcopy(bare), "prompt[length=4]")
    rows, inputs = module(model, "embeddings.token", "prompt").tokens, batch()
    is_global = torch.zeros(3, 9, dtype=torch.long)
    is_global[0, 6] = is_global[1, 2] = is_global[2, 0] = 1
    embeds = torch.cat([rows.expand(3, -1, -1), bare.embeddings.token(inputs["input_ids"])], dim=1)
    expected = bare(
        inputs_embeds=embeds, attention_mask=F.pad(inputs["attention_mask"], (4, 0), value=1),
        global_attention_mask=F.pad(is_global, (4, 0), value=1),
    ).last_hidden_state[:, 4:]  # fmt: skip
    got = model(**inputs, global_attention_mask=is_global).last_hidden_state
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(
        got, model(**inputs, global_attention_mask=is_global.roll(1, 1)).last_hidden_state, atol=1e-6
    )


# --- counts and rates ---

TRUNK = 3 * D + D * 5 + 5
COUNTS = [
    ("prompt[length=5]", 5 * D),
    ("prompt[length=5, init=text, ids=(1, 2)]", 5 * D),
    ("p_tuning[length=3, hidden=5]", 3 * D + (D * 5 + 5) + (5 * 5 + 5) + (5 * D + D)),
    (
        "p_tuning[length=3, hidden=5, encoder=lstm]",
        3 * D + 2 * 4 * (D * 5 + 5 * 5 + 2 * 5) + 2 * 4 * (10 * 5 + 5 * 5 + 2 * 5) + (10 * 10 + 10) + (10 * D + D),
    ),
    ("ipt[dim=4, length=3, hidden=5]", 4 + (4 * 5 + 5) + (5 * 3 * D + 3 * D)),
    ("prefix[length=3]", LAYERS * 2 * 3 * D),
    ("prefix[length=3, init=activations]", LAYERS * 2 * 3 * D),
    ("prefix[length=3, softmax=own]", LAYERS * (2 * 3 * D + 2)),
    ("prefix[length=3, form=mlp, hidden=5]", TRUNK + LAYERS * (5 * 2 * D + 2 * D)),
    ("deep_prompt[length=3]", LAYERS * 3 * D),
    ("llama_adapter[length=3]", 3 * D + 2),
    ("llama_adapter[length=3, skip=0]", LAYERS * (3 * D + 2)),
]


@pytest.mark.parametrize("attention", ["full", "longformer[window=4]", "lsh[chunk=8]"])
@pytest.mark.parametrize(("spec", "count"), COUNTS)
def test_trainable_parameters_are_the_closed_form(tiny, spec, count, attention):
    model = build(tiny, attention, peft=spec)
    account = effzoo.account(model)
    assert account.trainable == count + HEAD and account.changed is None
    assert sum(x.numel() for x in stored_tensors(model, "default").values()) == count + HEAD


def test_grouped_keys_have_narrower_prefixes_and_gates_for_every_query_head(tiny):
    kept = {key: tiny[key] for key in ("dim", "layers", "heads", "mlp", "vocab", "max_length")}
    for spec, count in (
        ("prefix[length=3]", 2 * 3 * D // 2),
        ("prefix[length=3, softmax=own]", 2 * 3 * D // 2 + 2),
        ("deep_prompt[length=3]", 3 * D),
    ):
        model = effzoo.attach(effzoo.build("llama", kv_heads=1, **kept), spec)
        assert effzoo.account(model).trainable == LAYERS * count


@pytest.mark.parametrize("name", ["prompt", "prefix", "deep_prompt", "llama_adapter", "p_tuning", "ipt"])
def test_the_size_can_be_set_within_a_budget(tiny, name):
    model = build(tiny)
    spec = effzoo.peft.within(model, name, 40_000)
    count = sum(p.numel() for p in effzoo.attach(model, spec).parameters() if p.requires_grad) - HEAD
    assert 20_000 < count <= 40_000


def test_more_prompt_rows_than_room_for_global_tokens_need_no_more_room_in_eager_code():
    """Longformer's max_globals is a limit where nobody counts; here are 20 rows, and 16 are room for those that a batch
    marks."""
    sizes = {"dim": 16, "layers": 1, "heads": 2, "mlp": 24, "vocab": 53, "max_length": 64, "task": "causal_lm"}
    ids = torch.randint(2, 53, (2, 9), generator=torch.Generator().manual_seed(0))
    outputs = []
    for room in (16, 40):
        torch.manual_seed(0)
        model = effzoo.build("gpt2", attention=f"longformer[window=4, max_globals={room}]", **sizes).double().eval()
        effzoo.attach(model, "ipt[dim=5, length=20, hidden=4]")
        out = model(input_ids=ids, labels=ids, global_attention_mask=torch.ones_like(ids))
        out.loss.backward()
        gradient = next(p.grad for key, p in model.named_parameters() if key.endswith("z"))
        outputs.append((out.logits.detach(), gradient, effzoo.generate(model, ids, max_new_tokens=3)))
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True)) and outputs[0][1].abs().max() > 0
