"""The methods of function composition compute the formulas of their papers, written out by hand, and train as many
parameters as these say."""

import copy

import pytest
import torch
from support import module
from torch import nn
from torch.nn import functional as F

import effzoo
from effzoo.errors import AdapterError, IncompatibleError, IncompatiblePeft, OptionError, TargetError
from effzoo.peft.function.adamix import Projections
from effzoo.peft.function.compacter import PHM, LowRankPHM
from effzoo.sites import NOWHERE, Conv2d, HookContext, Linear, calling, sites

D, MLP, LAYERS, LABELS, HEADS = 16, 32, 2, 3, 2
HEAD = D * LABELS + LABELS


def build(tiny, peft, attention="full", name="minilm", **more):
    """A model with the adapter and every parameter away from where it starts, in float64."""
    sizes = {"task": "classification", "num_labels": LABELS, "pooling": "mean", "head_dense": False, **tiny, **more}
    model = effzoo.attach(effzoo.build(name, attention=attention, **sizes).double(), peft)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(actual, expected, *inputs):
    """Equal forward and in the gradients of the inputs."""
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("spec", "scale"), [("parallel", 1.0), ("scaled_parallel", 4.0), ("parallel[scale=0.5]", 0.5)])
def test_a_parallel_adapter_reads_what_the_sub_layer_reads(tiny, spec, scale):
    model = build(tiny, spec)
    branch, x, y = model.blocks[0].mlp_branch, tokens(2, 5, D), tokens(2, 5, D)
    one = module(model, "blocks.0.mlp_branch", spec.split("[")[0])
    expected = y + scale * F.linear(F.relu(F.linear(x, one.down.weight, one.down.bias)), one.up.weight, one.up.bias)
    assert_same(branch(x, y), expected, x, y, one.down.weight, one.up.weight)


def test_a_learned_scale_is_a_parameter_that_starts_where_it_is_given(tiny):
    model = effzoo.build("minilm", peft="scaled_parallel[learned=true]", **tiny)
    scale = module(model, "blocks.0.mlp_branch", "scaled_parallel").scale
    assert isinstance(scale, nn.Parameter) and scale.item() == 4.0


def test_pfeiffer_has_one_adapter_per_block_after_the_feed_forward(tiny):
    model = build(tiny, "pfeiffer[bottleneck=3]")
    assert [path for path, site in sites(model) if site.adapters and not site.role.startswith("head")] == [
        f"blocks.{i}.mlp_branch" for i in range(2)
    ]
    one, x, y = module(model, "blocks.1.mlp_branch", "pfeiffer"), tokens(2, 5, D), tokens(2, 5, D)
    expected = y + F.linear(F.relu(F.linear(y, one.down.weight, one.down.bias)), one.up.weight, one.up.bias)
    assert_same(model.blocks[1].mlp_branch(x, y), expected, y, one.down.weight)


@pytest.mark.parametrize(("inputs", "outputs", "n"), [(12, 8, 4), (8, 12, 2), (6, 9, 3), (5, 7, 1)])
def test_phm_layers_are_sums_of_kronecker_products(inputs, outputs, n):
    rules = nn.Parameter(torch.randn(n, n, n, dtype=torch.float64))
    full, thin = PHM(inputs, outputs, rules).double(), LowRankPHM(inputs, outputs, rules, 2).double()
    for layer in (full, thin):
        nn.init.normal_(layer.bias)
        B = layer.B if layer is full else torch.einsum("ior,icr->ioc", layer.s, layer.t)
        W = sum(torch.kron(A, b) for A, b in zip(rules, B, strict=True))
        x = tokens(2, 3, inputs)
        assert torch.allclose(layer.matrix(), W, rtol=0, atol=1e-12)
        assert_same(layer(x), F.linear(x, W, layer.bias), x, rules, *layer.parameters())


def test_compacter_shares_its_rules_and_phm_does_not(tiny):
    rules = {
        spec: {
            id(p)
            for name, p in build(tiny, f"{spec}[bottleneck=8]").named_parameters(remove_duplicate=False)
            if name.endswith(".A")
        }
        for spec in ("compacter", "compacter_plus", "phm")
    }
    assert {spec: len(found) for spec, found in rules.items()} == {
        "compacter": 1,
        "compacter_plus": 1,
        "phm": 4 * LAYERS,
    }


B, N, R = 8, 4, 1
NORMS = LAYERS * 2 * 2 * D
COUNTS = [
    ("parallel[bottleneck=3]", LAYERS * (2 * 3 * D + 3 + D)),
    ("scaled_parallel[bottleneck=3, learned=true]", LAYERS * (2 * 3 * D + 3 + D + 1)),
    ("parallel[bottleneck=3, targets=(attn.branch, mlp.branch)]", 2 * LAYERS * (2 * 3 * D + 3 + D)),
    ("pfeiffer[bottleneck=3]", LAYERS * (2 * 3 * D + 3 + D)),
    ("phm[bottleneck=8]", 2 * LAYERS * (2 * N**3 + 2 * D * B // N + D + B) + NORMS),
    ("compacter[bottleneck=8]", N**3 + 2 * LAYERS * (2 * R * (D + B) + D + B) + NORMS),
    ("compacter_plus[bottleneck=8, rank=2]", N**3 + LAYERS * (2 * 2 * (D + B) + D + B) + NORMS),
    ("sparse_adapter[bottleneck=10, sparsity=0.8]", 2 * LAYERS * (2 * round(0.2 * D * 10) + D + 10)),
    ("adamix[bottleneck=3, experts=4]", LAYERS * 4 * (2 * 3 * D + 3 + D)),
    ("adamix[bottleneck=3, experts=4, share=down]", LAYERS * (3 * D + 3 + 4 * (3 * D + D))),
    ("pals[width=6, heads=2]", 2 * 6 * D + 6 + D + LAYERS * (3 * 6 * 6 + 3 * 6)),
    ("multihead_parallel[bottleneck=3]", LAYERS * HEADS * 3 * (D + D // HEADS)),
    ("ia3", LAYERS * (2 * D + MLP)),
]


@pytest.mark.parametrize(("spec", "count"), COUNTS)
def test_trained_parameters_are_the_closed_form(tiny, spec, count):
    model = effzoo.build("minilm", peft=spec, task="classification", num_labels=LABELS, head_dense=False, **tiny)
    assert effzoo.account(model).trainable == count + HEAD


def test_a_finished_adamix_is_one_adapter_with_the_mean_of_the_experts(tiny):
    model = build(tiny, "adamix[bottleneck=3, experts=4]")
    one, x, y = module(model, "blocks.0.mlp_branch", "adamix"), tokens(2, 5, D), tokens(2, 5, D)
    down, up = ((p.weights.mean(dim=0), p.biases.mean(dim=0)) for p in (one.down, one.up))
    assert_same(
        model.blocks[0].mlp_branch(x, y),
        y + F.linear(F.gelu(F.linear(y, *down)), *up),
        y,
        one.down.weights,
        one.up.biases,
    )
    before = model.blocks[0].mlp_branch(x, y)
    effzoo.peft.finish(model)
    assert torch.allclose(model.blocks[0].mlp_branch(x, y), before, rtol=0, atol=1e-14)
    assert effzoo.account(model).stored == LAYERS * (2 * 3 * D + 3 + D) + HEAD


def test_adamix_draws_each_expert_equally_often_and_down_apart_from_up():
    torch.manual_seed(0)
    layer = Projections(4, 2, 1, 0.01)
    with torch.no_grad():
        layer.weights.zero_()
        layer.biases.copy_(torch.arange(4.0)[:, None])
    draws = torch.tensor([float(layer(torch.zeros(1, 2)).detach()) for _ in range(2000)])
    counts = torch.bincount(draws.long(), minlength=4)
    assert set(draws.tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5  # standard deviations


def test_two_passes_of_adamix_are_pulled_together_by_the_symmetric_divergence(tiny):
    model = build(tiny, "adamix[bottleneck=3]").train()
    batch = {"input_ids": torch.randint(2, 53, (4, 7)), "labels": torch.tensor([0, 1, 2, 0])}
    torch.manual_seed(3)
    loss = effzoo.peft.loss(model, **batch)
    torch.manual_seed(3)
    one, other = model(**batch), model(**batch)
    p, q = one.logits.softmax(-1), other.logits.softmax(-1)
    divergence = ((p * (p / q).log()).sum(-1) + (q * (q / p).log()).sum(-1)).mean() / 2
    assert not torch.allclose(one.logits, other.logits)
    assert torch.allclose(loss, (one.loss + other.loss) / 2 + divergence, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", ["none", "down", "up"])
def test_a_training_pass_of_adamix_is_one_of_its_pairs_of_experts(tiny, share):
    model = build(tiny, f"adamix[bottleneck=3, experts=3, share={share}]")
    one, y = module(model, "blocks.0.mlp_branch", "adamix").train(), tokens(2, 5, D)
    pairs = [
        y + F.linear(F.gelu(F.linear(y, one.down.weights[i], one.down.biases[i])), one.up.weights[j], one.up.biases[j])
        for i in range(1 if share == "down" else 3)
        for j in range(1 if share == "up" else 3)
    ]
    drawn = []
    for _ in range(60):
        out = one.after(y, y, NOWHERE)
        drawn += [k for k, pair in enumerate(pairs) if torch.allclose(out, pair, rtol=0, atol=1e-13)]
    assert len(drawn) == 60 and {*drawn} == {*range(len(pairs))}


def test_rows_of_one_adapter_draw_their_experts_together(tiny):
    model = effzoo.build("minilm", task="classification", num_labels=LABELS, **tiny)
    for name in ("one", "other"):
        effzoo.attach(model, "adamix[bottleneck=3]", name=name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    effzoo.activate(model, rows=["one", "other", "one", "one", "one", "one"]).train()
    out = model(input_ids=torch.arange(2, 9).expand(6, -1)).logits
    assert not torch.allclose(out[0], out[1]) and torch.allclose(
        out[[0, 2, 3, 4, 5]], out[0].expand(5, -1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("by", ["snip", "magnitude", "random"])
def test_pruned_entries_of_a_sparse_adapter_stay_zero(tiny, by):
    model = effzoo.build("minilm", task="classification", num_labels=LABELS, **tiny).double()
    effzoo.attach(model, f"sparse_adapter[bottleneck=10, by={by}]")
    batch = {"input_ids": torch.randint(2, 53, (4, 7)), "labels": torch.tensor([0, 1, 2, 0])}
    effzoo.peft.calibrate(model, [batch])
    layers = [
        layer
        for _, site in sites(model)
        if site.role.endswith("branch")
        for layer in site.of("default")["sparse_adapter"].children()
    ][:2]
    before = [layer.matrix().detach() for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for layer, start in zip(layers, before, strict=True):
        now = layer.matrix().detach()
        assert (
            int((start != 0).sum()) == round(0.2 * D * 10)
            and torch.equal(now != 0, start != 0)
            and not torch.equal(now, start)
        )


def test_a_sparse_adapter_is_stored_as_places_and_values(tiny, tmp_path):
    model = effzoo.build("minilm", task="classification", num_labels=LABELS, **tiny)
    base = copy.deepcopy(model)
    effzoo.attach(model, "sparse_adapter[bottleneck=40, sparsity=0.9]")
    batch = {"input_ids": torch.randint(2, 53, (4, 7)), "labels": torch.tensor([0, 1, 2, 0])}
    effzoo.peft.calibrate(model, [batch])
    dense = 2 * LAYERS * 2 * 40 * D
    assert effzoo.account(model).stored == 2 * dense // 10 + 2 * LAYERS * (40 + D) + HEAD
    expected = model.eval()(**batch).logits
    effzoo.save_adapter(model, tmp_path)
    assert torch.equal(effzoo.load_adapter(base, tmp_path).eval()(**batch).logits, expected)


def test_snip_keeps_the_entries_whose_loss_is_most_sensitive(tiny):
    """|w dL/dw| of the dense adapter, over all batches, the largest in each matrix."""
    model = effzoo.build("minilm", task="classification", num_labels=LABELS, **tiny).double()
    effzoo.attach(model, "sparse_adapter[bottleneck=10]")
    batches = [{"input_ids": torch.randint(2, 53, (4, n)), "labels": torch.tensor([0, 1, 2, 0])} for n in (5, 7)]
    sparse = module(model, "blocks.0.mlp_branch", "sparse_adapter")
    twin = copy.deepcopy(model)
    dense = {}
    for path, site in sites(twin):
        if site.role.endswith("branch"):
            for name, layer in site.of("default")["sparse_adapter"].named_children():
                if hasattr(layer, "start"):
                    layer.probe = dense[path, name] = nn.Parameter(layer.start.clone())
    sum(twin.eval()(**batch).loss for batch in batches).backward()
    effzoo.peft.calibrate(model, batches)
    for name in ("down", "up"):
        probe, layer = dense["blocks.0.mlp_branch", name], getattr(sparse, name)
        wanted = (probe * probe.grad).abs().flatten().topk(round(0.2 * D * 10)).indices.sort().values
        assert torch.equal(layer.indices.long(), wanted)
        assert torch.equal(layer.values.detach(), probe.detach().flatten()[wanted])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("attention", ["full", "longformer[window=4]", "lsh[chunk=4]", "linformer[k=4]"])
def test_the_ladder_is_narrow_blocks_that_read_the_states_of_the_backbone(tiny, skip, attention):
    model = build(tiny, f"ladder[reduction=2, skip={skip}]", attention)
    ladder, ids = module(model, "side", "ladder"), torch.randint(2, 53, (2, 9))
    bare = effzoo.activate(copy.deepcopy(model))
    mask = effzoo.attention.Mask(is_global=model_globals(model, ids))
    states = [bare.embeddings(ids)[0]]
    for block in bare.blocks:
        states.append(block(states[-1], mask))
    h, states = ladder.first(states[0].detach()), [state.detach() for state in states]
    for i, block in enumerate(ladder.blocks):
        mu = torch.sigmoid(ladder.alpha[i] / 0.1)
        h = block(
            mu * h + (1 - mu) * ladder.downs[i](states[i + 1]),
            effzoo.attention.Mask(is_global=model_globals(model, ids)),
        )
    expected = ladder.up(ladder.norm(h)) + (states[-1] if skip else 0)
    assert_same(model(input_ids=ids).last_hidden_state, expected, *ladder.parameters())


def model_globals(model, ids):
    """The default global token of a classifier whose attention has projections for it."""
    if not any(core.knows_globals() for core in model.cores()):
        return None
    return (torch.arange(ids.shape[1]) == 0).expand(ids.shape)


def test_nothing_of_the_backbone_is_stored_or_gets_a_gradient_under_the_ladder(tiny):
    """Twice as wide feed-forwards of the backbone store nothing more."""
    stored = []
    for mlp in (MLP, 8 * MLP):
        model = effzoo.build("minilm", task="classification", num_labels=LABELS, **{**tiny, "mlp": mlp})
        effzoo.attach(model, "ladder[reduction=2]")
        side = model.side.of("default")["ladder"]
        seen: dict[int, int] = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(input_ids=torch.arange(2, 42).view(2, 20), labels=torch.tensor([0, 1])).loss
        loss.backward()
        own = sum(p.numel() * p.element_size() for p in side.parameters())
        stored.append(sum(seen.values()) - own)
        assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
        assert not any(p.grad is None for p in side.parameters() if p.requires_grad)
    # the side network's own feed-forward is wider too: input and activation
    widening = 2 * 20 * (8 - 1) * MLP // 2 * 4 * 2 * LAYERS
    assert stored[1] - stored[0] <= widening + 64


@pytest.mark.parametrize("beside", ["lora[rank=2]", "prompt[length=2]", "prefix[length=2]"])
@pytest.mark.parametrize("more", [{}, {"norm": "pre", "residual": "reversible"}])
def test_what_is_trained_inside_the_backbone_learns_through_the_ladder(tiny, beside, more):
    """The derivative in a direction, against the difference quotient."""
    model = build(tiny, f"ladder[reduction=2]|{beside}", **more)
    inputs = {"input_ids": torch.arange(2, 20).view(2, 9), "labels": torch.tensor([0, 1])}
    inside = [
        p for name, p in model.named_parameters() if p.requires_grad and ".ladder." not in name and "head" not in name
    ]
    gradients = torch.autograd.grad(model(**inputs).loss, inside)
    directions = [torch.randn_like(p) for p in inside]
    losses = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for p, direction in zip(inside, directions, strict=True):
                p.add_(step * direction)
            losses.append(model(**inputs).loss)
    slope = sum((g * direction).sum() for g, direction in zip(gradients, directions, strict=True))
    assert abs(slope) > 1e-6 and torch.allclose((losses[0] - losses[1]) / 2e-5, slope, rtol=1e-6)


def stored_activations(model):
    """Storages that the backward pass keeps, with their bytes; those that sub-modules of the backbone made, and its
    states among them."""
    made, states, kept, alive = set(), set(), {}, []

    def look(layer, inputs, output):
        if isinstance(output, torch.Tensor):  # and not what a memory site has none of
            alive.append(output)  # or another tensor would take the place
            (states if layer in model.blocks else made).add(output.untyped_storage().data_ptr())

    for block in model.blocks:
        for layer in block.modules():
            layer.register_forward_hook(look)

    def pack(tensor):
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=torch.arange(2, 42).view(2, 20), labels=torch.tensor([0, 1])).loss
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return {place: size for place, size in kept.items() if place not in weights}, made, states


def test_of_the_backbone_the_ladder_stores_states_alone_and_lora_what_lies_between_them(tiny):
    kept = {}
    for spec in ("ladder[reduction=8]", "lora"):
        model = effzoo.build(
            "minilm",
            peft=spec,
            task="classification",
            num_labels=LABELS,
            **{**tiny, "dim": 64, "mlp": 256, "layers": 3},
        )
        kept[spec], made, states = stored_activations(model)
        inside = kept[spec].keys() & (made - states)
        assert bool(inside) == (spec == "lora")
    assert 2 * sum(kept["ladder[reduction=8]"].values()) < sum(kept["lora"].values())


@pytest.mark.parametrize(
    ("name", "attention", "more"),
    [
        ("bert", "full", {}),
        ("bert", "longformer[window=4]", {}),
        ("bert", "lsh[chunk=4]", {}),
        ("bert", "linformer[k=4]", {}),
        ("bert", "perceiver[latents=4]", {}),
        ("llama", "full", {"kv_heads": 1}),
        ("qwen3", "full", {"kv_heads": 1}),
        ("modernbert", ("full", "longformer[window=4]"), {}),
    ],
)
def test_side_blocks_of_the_backbones_width_start_as_its_blocks(tiny, name, attention, more):
    model = effzoo.build(name, attention=attention, **{**tiny, "head_dim": 8, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    ladder = module(effzoo.attach(model, "ladder[reduction=1]"), "side", "ladder")
    copied, own = ladder.blocks.state_dict(), model.blocks.state_dict()
    assert {*copied} <= {*own} and all(torch.equal(value, own[key]) for key, value in copied.items())
    x = torch.randn(2, D)
    assert torch.equal(ladder.first(x), x) and torch.equal(ladder.downs[1](x), x)


def test_narrow_side_blocks_start_from_the_channels_with_the_largest_weights(tiny):
    model = effzoo.build("bert", **tiny)
    ladder = module(effzoo.attach(model, "ladder[reduction=2, every=2]"), "side", "ladder")
    block, side = model.blocks[1], ladder.blocks[0]
    reads = [getattr(block.attn, name).weight for name in "qkv"] + [block.mlp.up.weight]
    writes = [block.attn.o.weight, block.mlp.down.weight]
    stream = sum(W.square().sum(0) for W in reads) + sum(W.square().sum(1) for W in writes)
    kept = stream.topk(D // 2).indices.sort().values
    hidden = (
        (block.mlp.up.weight.square().sum(1) + block.mlp.down.weight.square().sum(0))
        .topk(MLP // 2)
        .indices.sort()
        .values
    )
    q, k, v = (getattr(block.attn, name).weight.view(HEADS, 8, D) for name in "qkv")
    compared = (q.square().sum((0, 2)) + k.square().sum((0, 2))).topk(4).indices.sort().values
    o = block.attn.o.weight.view(D, HEADS, 8)
    values = (v.square().sum((0, 2)) + o.square().sum((0, 1))).topk(4).indices.sort().values
    for name, W, dims in (("q", q, compared), ("k", k, compared), ("v", v, values)):
        assert torch.equal(getattr(side.attn, name).weight, W[:, dims][..., kept].reshape(8, 8))
    assert torch.equal(side.attn.o.weight, o[kept][:, :, values].reshape(8, 8))
    assert torch.equal(side.mlp.up.weight, block.mlp.up.weight[hidden][:, kept])
    assert torch.equal(side.mlp.down.weight, block.mlp.down.weight[kept][:, hidden])
    x = torch.randn(2, D)
    assert torch.equal(ladder.downs[0](x), x[:, kept])


def test_a_ladder_on_every_other_block_holds_what_linformer_shares_between_layers(tiny):
    model = effzoo.build("bert", attention="linformer[k=4, sharing=layerwise]", peft="ladder[every=2]", **tiny)
    ladder = module(model, "side", "ladder")
    own = {p for _, site in sites(ladder.blocks[0]) for p in site.parameters()}
    model(input_ids=torch.arange(2, 12)[None]).last_hidden_state.sum().backward()
    shared = ladder.blocks[0].attn.core._sites("k")[0].weight
    assert shared in own and shared in {*model.parameters()}


def test_a_ladder_decodes_without_a_cache_alone(tiny):
    model = effzoo.build("gpt2", task="causal_lm", peft="ladder[reduction=2]", **tiny).eval()
    ids = torch.randint(2, 53, (1, 5))
    with pytest.raises(IncompatibleError, match="use_cache=False"):
        effzoo.generate(model, ids, max_new_tokens=2)
    assert effzoo.generate(model, ids, max_new_tokens=2, use_cache=False).shape == (1, 7)


def test_a_perceiver_has_no_blocks_beside_which_a_ladder_could_stand(tiny):
    with pytest.raises(IncompatiblePeft, match="ladder does not work with this model: it hangs on Side sites"):
        effzoo.build("perceiver-io", peft="ladder", **{**tiny, "channels": 12, "latents": 4})


@pytest.mark.parametrize("padded", [False, True])
def test_pals_are_attention_between_two_shared_projections(tiny, padded):
    model = build(tiny, "pals[width=6, heads=2]")
    pal, other = (module(model, f"blocks.{i}.mlp_branch", "pals") for i in range(2))
    assert pal.encode is other.encode and pal.decode is other.decode and pal.qkv is not other.qkv
    x, y = tokens(2, 5, D), tokens(2, 5, D)
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool() if padded else None
    encoded = F.linear(x, pal.encode.weight, pal.encode.bias)
    q, k, v = F.linear(encoded, pal.qkv.weight, pal.qkv.bias).chunk(3, dim=-1)
    heads = []
    for q_, k_, v_ in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True):
        scores = q_ @ k_.transpose(1, 2) / 3**0.5
        heads.append((scores if valid is None else scores.masked_fill(~valid[:, None], -torch.inf)).softmax(-1) @ v_)
    expected = y + F.linear(torch.cat(heads, dim=-1), pal.decode.weight, pal.decode.bias)
    with calling(HookContext(valid)):
        got = model.blocks[0].mlp_branch(x, y)
    assert_same(got, expected, x, y, pal.qkv.weight, pal.encode.weight)


@pytest.mark.parametrize("attention", ["full", "longformer[window=4]", "lsh[chunk=4]"])
@pytest.mark.parametrize("spec", ["pals[width=6, heads=2]", "ladder[reduction=2]", "multihead_parallel", "ia3"])
def test_methods_that_mix_tokens_do_not_see_padding(tiny, spec, attention):
    model = build(tiny, spec, attention)
    ids, mask = torch.randint(2, 53, (2, 9)), torch.ones(2, 9)
    mask[1, 5:] = 0
    other = ids.clone()
    other[1, 5:] = 7
    assert torch.equal(
        model(input_ids=ids, attention_mask=mask).logits, model(input_ids=other, attention_mask=mask).logits
    )
    assert torch.allclose(
        model(input_ids=ids[1:, :5]).logits[0], model(input_ids=ids, attention_mask=mask).logits[1], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("attention", ["full", "longformer[window=4]", "lsh[chunk=4]"])
def test_multi_head_parallel_adapters_stand_beside_each_head(tiny, attention):
    model = build(tiny, "multihead_parallel[bottleneck=3, scale=2]", attention)
    attn, x = model.blocks[0].attn, tokens(2, 8, D)
    one = module(model, "blocks.0.attn.o", "multihead_parallel")
    got = attn(x, effzoo.attention.Mask())
    bare = effzoo.activate(copy.deepcopy(model)).blocks[0].attn(x, effzoo.attention.Mask())
    heads = [F.relu(x @ one.down[h].T) @ one.up[h].T for h in range(HEADS)]
    assert_same(got, bare + 2 * torch.cat(heads, dim=-1) @ attn.o.weight.T, x, one.down, one.up)


def test_ia3_scales_the_normalised_keys_of_lsh_and_neither_its_queries_nor_its_buckets(tiny):
    """One chunk: softmax over all others of x_i . (l_k * x_j / |x_j|), times l_v * v_j."""
    model = build(tiny, "ia3", "lsh[chunk=16]")
    attn, x = model.blocks[0].attn, tokens(2, 7, D)
    l_k, l_v = (module(model, f"blocks.0.attn.{path}", "ia3").scale for path in ("core.keys", "v"))

    def heads(flat):
        return flat.unflatten(-1, (HEADS, D // HEADS)).transpose(1, 2)

    queries = heads(F.linear(x, attn.qk.weight, attn.qk.bias))
    keys = queries / (queries.square().mean(-1, keepdim=True) + 1e-6).sqrt() / (D // HEADS) ** 0.5
    scores = queries @ (l_k.view(HEADS, 1, -1) * keys).transpose(-1, -2)
    weights = scores.masked_fill(torch.eye(7).bool(), -torch.inf).softmax(-1)
    out = weights @ heads(l_v * F.linear(x, attn.v.weight, attn.v.bias))
    expected = F.linear(out.transpose(1, 2).flatten(2), attn.o.weight, attn.o.bias)
    assert_same(attn(x, effzoo.attention.Mask()), expected, x, l_k, l_v)


@pytest.mark.parametrize("causal", [False, True])
def test_ia3_on_lsh_in_rounds_of_chunks_is_the_dense_definition_with_scaled_keys(tiny, causal):
    """The scale can as well stand at the queries, x_i . (l * k_j) = (l * x_i) . k_j, as long as they hash as they
    are."""
    model = build(tiny, "ia3", "lsh[chunk=4, rounds=3]", name="gpt2" if causal else "minilm")
    core, v = model.blocks[0].attn.core, tokens(2, HEADS, 19, D // HEADS)
    qk = tokens(2, HEADS, 19, D // HEADS)
    mask = effzoo.attention.Mask(valid=torch.arange(19) < torch.tensor([[19], [13]]))
    scale = core.keys.of("default")["ia3"].scale
    buckets = core._buckets(qk, mask)
    mine, other = buckets[..., :, None], buckets[..., None, :]
    # how many stand before
    place = ((other < mine) | ((other == mine) & torch.ones(19, 19).tril(-1).bool())).sum(dim=-1)
    counts = core._counts(buckets, place, 0, mask, False)
    keys = qk / (qk.square().mean(-1, keepdim=True) + 1e-6).sqrt() / (D // HEADS) ** 0.5
    logits = (scale.view(HEADS, 1, -1) * qk) @ keys.transpose(-1, -2) + counts.double().log()
    real = mask.valid[:, None, :, None]
    expected = torch.where(real, logits, 0.0).softmax(-1).masked_fill(~real, 0.0) @ v
    assert_same(core(qk, v, mask=mask), expected, qk, v, scale)


def test_ia3_on_lsh_decodes_as_it_is_trained(tiny):
    model = build(tiny, "ia3", "lsh[chunk=4, stable=true]", name="gpt2", task="causal_lm")
    ids, cache = torch.randint(2, 53, (2, 11)), effzoo.attention.Cache()
    steps = [model(input_ids=part, cache=cache).logits for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:])]
    assert torch.allclose(torch.cat(steps, dim=1), model(input_ids=ids).logits, rtol=0, atol=1e-10)


def test_ia3_merges_where_keys_have_a_projection_of_their_own_alone(tiny):
    for attention in ("full", "longformer[window=4]", "linformer[k=4]", "lsh[chunk=4]"):
        model, ids = build(tiny, "ia3", attention), torch.randint(2, 53, (2, 9))
        before = model(input_ids=ids).logits
        if attention.startswith("lsh"):
            with pytest.raises(AdapterError, match="not a change of a weight"):
                effzoo.merge(model)
            continue
        effzoo.merge(model)
        assert torch.allclose(model(input_ids=ids).logits, before, rtol=0, atol=1e-10)
    model = build(tiny, "ia3[targets=(attn.v*, mlp.down)]", "lsh[chunk=4]")
    before = model(input_ids=ids).logits
    assert torch.allclose(effzoo.merge(model)(input_ids=ids).logits, before, rtol=0, atol=1e-10)


class ConvNet(nn.Module):
    """Two convolutions and a linear layer, all of them sites."""

    def __init__(self, stride=1):
        super().__init__()
        self.conv1 = Conv2d(1, 4, 3, padding=1, role="conv.1", layer=0)
        self.conv2 = Conv2d(4, 6, 3, stride=stride, padding=1, role="conv.2", layer=1)
        self.head = Linear(6, 3, role="head.out")

    def forward(self, x):
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean(dim=(2, 3)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["series", "parallel"])
def test_residual_adapters_of_convolutions_learn_merge_and_leave_no_trace(form, stride):
    net, x = ConvNet(stride).double(), torch.randn(5, 1, 7, 6, dtype=torch.float64)
    before, keys = net(x).detach(), {*net.state_dict()}
    effzoo.attach(net, f"residual_adapter[form={form}]")
    assert torch.equal(net(x), before)
    assert effzoo.account(net).trainable == (4 * 4 + 6 * 6 if form == "series" else 4 * 1 + 6 * 4) + 6 * 3 + 3
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-1)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    one = net.conv2.of("default")["residual_adapter"]
    y = F.conv2d(x.new_ones(2, 4, 7, 6).cumsum(3), net.conv2.weight, net.conv2.bias, stride=stride, padding=1)
    inputs = x.new_ones(2, 4, 7, 6).cumsum(3)
    seen = y if form == "series" else inputs[:, :, ::stride, ::stride]
    assert torch.allclose(net.conv2(inputs), y + torch.einsum("po,bohw->bphw", one.M, seen), rtol=0, atol=1e-12)
    trained = net(x)
    effzoo.merge(net)
    assert torch.allclose(net(x), trained, rtol=0, atol=1e-12) and {*net.state_dict()} == keys
    effzoo.unmerge(net)
    effzoo.detach(net, "default")
    assert torch.equal(net(x), before)


def test_residual_adapters_need_a_convolution(tiny):
    with pytest.raises(IncompatiblePeft, match="it hangs on Conv2d sites"):
        effzoo.build("bert", peft="residual_adapter", **tiny)
    with pytest.raises(TargetError, match="hangs on Conv2d sites"):
        effzoo.build("bert", peft="residual_adapter[targets=attn.q]", **tiny)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("parallel[scale=0]", "nothing learns"),
        ("pfeiffer[bottleneck=0]", "at least 1"),
        ("parallel[activation=step]", "one of gelu"),
        ("phm[bottleneck=10]", "try bottleneck=12"),
        ("compacter[n=3, bottleneck=9]", "does not divide the width 16"),
        ("compacter[rank=0]", "rank is at least 1"),
        ("sparse_adapter[sparsity=1.0]", r"in \[0, 1\)"),
        ("sparse_adapter[by=luck]", "by is .snip. or .magnitude. or .random., got .luck."),
        ("adamix[share=both]", "takes .down. or .up. or none"),
        ("adamix[experts=0]", "at least 1"),
        ("pals[width=5, heads=2]", "divides width"),
        ("ladder[every=9]", "at most 2"),
        ("multihead_parallel[scale=0]", "nothing learns"),
    ],
)
def test_bad_options_are_refused_with_what_is_accepted(tiny, spec, problem):
    with pytest.raises(OptionError, match=problem):
        effzoo.build("bert", peft=spec, **tiny)


def test_pals_refuse_a_causal_model(tiny):
    with pytest.raises(IncompatiblePeft, match="use parallel"):
        effzoo.build("gpt2", peft="pals", **tiny)
