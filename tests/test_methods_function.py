"""The methods of the function door compute the formulas of their papers, written out by hand, and train as many parameters as these say."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effzoo
from effzoo.errors import IncompatiblePeft, OptionError, TargetError
from effzoo.peft.function.adamix import Projections
from effzoo.peft.function.compacter import PHM, LowRankPHM
from effzoo.sites import Conv2d, Linear, sites

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


def module(model, path, method):
    return dict(sites(model))[path].of("default")[method]


def tokens(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(actual, expected, *inputs):
    """Equal forward and in the gradients of the inputs."""
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad((actual * weights).sum(), inputs), torch.autograd.grad((expected * weights).sum(), inputs), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("spec", "scale"), [("parallel", 1.0), ("scaled_parallel", 4.0), ("parallel[scale=0.5]", 0.5)])
def test_a_parallel_adapter_reads_what_the_sub_layer_reads(tiny, spec, scale):
    model = build(tiny, spec)
    branch, x, y = model.blocks[0].mlp_branch, tokens(2, 5, D), tokens(2, 5, D)
    one = module(model, "blocks.0.mlp_branch", spec.split("[")[0])
    expected = y + scale * F.linear(F.relu(F.linear(x, one.down.weight, one.down.bias)), one.up.weight, one.up.bias)
    same(branch(x, y), expected, x, y, one.down.weight, one.up.weight)


def test_a_learned_scale_is_a_parameter_that_starts_where_it_is_given(tiny):
    model = effzoo.build("minilm", peft="scaled_parallel[learned=true]", **tiny)
    scale = module(model, "blocks.0.mlp_branch", "scaled_parallel").scale
    assert isinstance(scale, nn.Parameter) and scale.item() == 4.0


def test_pfeiffer_has_one_adapter_per_block_after_the_feed_forward(tiny):
    model = build(tiny, "pfeiffer[bottleneck=3]")
    assert [path for path, site in sites(model) if site.adapters and not site.role.startswith("head")] == [f"blocks.{i}.mlp_branch" for i in range(2)]
    one, x, y = module(model, "blocks.1.mlp_branch", "pfeiffer"), tokens(2, 5, D), tokens(2, 5, D)
    expected = y + F.linear(F.relu(F.linear(y, one.down.weight, one.down.bias)), one.up.weight, one.up.bias)
    same(model.blocks[1].mlp_branch(x, y), expected, y, one.down.weight)


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
        same(layer(x), F.linear(x, W, layer.bias), x, rules, *layer.parameters())


def test_compacter_shares_its_rules_and_phm_does_not(tiny):
    rules = {
        spec: {id(p) for name, p in build(tiny, f"{spec}[bottleneck=8]").named_parameters(remove_duplicate=False) if name.endswith(".A")}
        for spec in ("compacter", "compacter_plus", "phm")
    }
    assert {spec: len(found) for spec, found in rules.items()} == {"compacter": 1, "compacter_plus": 1, "phm": 4 * LAYERS}


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
    same(model.blocks[0].mlp_branch(x, y), y + F.linear(F.gelu(F.linear(y, *down)), *up), y, one.down.weights, one.up.biases)
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


@pytest.mark.parametrize("by", ["snip", "magnitude", "random"])
def test_pruned_entries_of_a_sparse_adapter_stay_zero(tiny, by):
    model = effzoo.build("minilm", task="classification", num_labels=LABELS, **tiny).double()
    effzoo.attach(model, f"sparse_adapter[bottleneck=10, by={by}]")
    batch = {"input_ids": torch.randint(2, 53, (4, 7)), "labels": torch.tensor([0, 1, 2, 0])}
    effzoo.peft.calibrate(model, [batch])
    layers = [layer for _, site in sites(model) if site.role.endswith("branch") for layer in site.of("default")["sparse_adapter"].children()][:2]
    before = [layer.matrix().detach() for layer in layers]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    for layer, start in zip(layers, before, strict=True):
        now = layer.matrix().detach()
        assert int((start != 0).sum()) == round(0.2 * D * 10) and torch.equal(now != 0, start != 0) and not torch.equal(now, start)


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
@pytest.mark.parametrize("attention", ["full", "longformer[window=4]", "lsh[chunk=4]"])
def test_the_ladder_reads_the_states_of_the_backbone(tiny, skip, attention):
    model = build(tiny, f"ladder[reduction=2, skip={skip}]", attention)
    ladder, ids = module(model, "side", "ladder"), torch.randint(2, 53, (2, 9))
    got = model(input_ids=ids).last_hidden_state
    effzoo.activate(model)
    states, x = [], model.embeddings(ids)[0]
    with torch.no_grad():
        for block in model.blocks:
            states.append(x)
            x = block(x, effzoo.attention.Mask(is_global=model_globals(model, ids)))
        states.append(x)
    h = ladder.first(states[0])
    for i, block in enumerate(ladder.blocks):
        mu = torch.sigmoid(ladder.alpha[i] / 0.1)
        h = block(mu * h + (1 - mu) * ladder.downs[i](states[i + 1]), effzoo.attention.Mask(is_global=model_globals(model, ids)))
    expected = ladder.up(ladder.norm(h)) + (states[-1] if skip else 0)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def model_globals(model, ids):
    """The default global token of a classifier whose attention has projections for it."""
    if not any(core.supports_global for core in model.cores()):
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
    widening = 2 * 20 * (8 - 1) * MLP // 2 * 4 * 2 * LAYERS  # the side network's own feed-forward is wider too: input and activation
    assert stored[1] - stored[0] <= widening + 64


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
    same(model.blocks[0].mlp_branch(x, y, valid), expected, x, y, pal.qkv.weight, pal.encode.weight)


def test_pals_do_not_see_padding(tiny):
    model = build(tiny, "pals[width=6, heads=2]")
    ids, mask = torch.randint(2, 53, (2, 9)), torch.ones(2, 9)
    mask[1, 5:] = 0
    other = ids.clone()
    other[1, 5:] = 7
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, model(input_ids=other, attention_mask=mask).logits)
    assert torch.allclose(model(input_ids=ids[1:, :5]).logits[0], model(input_ids=ids, attention_mask=mask).logits[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("attention", ["full", "longformer[window=4]", "lsh[chunk=4]"])
def test_multi_head_parallel_adapters_stand_beside_each_head(tiny, attention):
    model = build(tiny, "multihead_parallel[bottleneck=3, scale=2]", attention)
    attn, x = model.blocks[0].attn, tokens(2, 8, D)
    one = module(model, "blocks.0.attn.o", "multihead_parallel")
    got = attn(x, effzoo.attention.Mask())
    bare = effzoo.activate(copy.deepcopy(model)).blocks[0].attn(x, effzoo.attention.Mask())
    heads = [F.relu(x @ one.down[h].T) @ one.up[h].T for h in range(HEADS)]
    same(got, bare + 2 * torch.cat(heads, dim=-1) @ attn.o.weight.T, x, one.down, one.up)


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
        ("sparse_adapter[by=luck]", "snip, magnitude or random"),
        ("adamix[share=both]", "none, down or up"),
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
