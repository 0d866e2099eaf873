"""Feed-forwards behind a router: equal to the dense sum over experts, cheap whatever their number, and at home in every
model."""

import math

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import effzoo
from effzoo import convert, routing
from effzoo.attention.core import Mask
from effzoo.blocks import Experts, FeedForward
from effzoo.errors import ConversionError, IncompatibleError, OptionError
from effzoo.registry import attention
from effzoo.sites import sites
from tests.support import labelled, small

ROUTERS = (
    "uniform",
    "soft",
    "switch",
    "top_k",
    "gumbel",
    "gumbel[form=sigmoid]",
    "base",
    "expert_choice",
    "switch[capacity=0.5]",
)
DIM, EXPERTS = 8, 4


def layer(router, training=True, **options):
    made = [FeedForward(DIM, 12, "gelu", 0, **options) for _ in range(EXPERTS)]
    return Experts(made, DIM, router, causal=False).double().train(training)


def tokens(batch=2, n=11):
    return torch.randn(batch, n, DIM, dtype=torch.float64, requires_grad=True)


def build(tiny, name="bert", task="classification", experts=EXPERTS, **choices):
    torch.manual_seed(0)
    return effzoo.build(name, task=task, num_labels=3, experts=experts, **{**tiny, **choices}).double()


def routers(model):
    return [module for module in model.modules() if isinstance(module, routing.Router)]


def gradients(out, *tensors):
    return torch.autograd.grad(
        out, tensors, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape), allow_unused=True
    )


def assert_close(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        if mine is None or theirs is None:
            assert mine is theirs
        else:
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


# ---- the layer against its definition ----


@pytest.mark.parametrize(
    "options", [{}, {"gated": True, "bias": False}, {"chunk": 3}], ids=["plain", "gated", "chunked"]
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_sorted_tokens_equal_the_dense_sum_over_experts(router, training, options):
    own, x = layer(router, training, **options), tokens()
    torch.manual_seed(1)
    out = own(x)
    torch.manual_seed(1)
    dense = own.dense(x)
    parameters = [x, *own.parameters()]
    assert_close([out], [dense])
    assert_close(gradients(out, *parameters), gradients(dense, *parameters))


def test_the_dense_sum_is_the_definition_token_by_token():
    own, x = layer("top_k", training=False), tokens()
    out = own.dense(x)
    for b in range(2):
        for t in range(11):
            token = x[b, t]
            scores = [float((token @ row).detach()) for row in own.router.scores.weight]
            first, second = sorted(range(EXPERTS), key=scores.__getitem__)[:-3:-1]
            share = 1 / (1 + math.exp(scores[second] - scores[first]))
            expected = share * own.experts[first](token[None]) + (1 - share) * own.experts[second](token[None])
            torch.testing.assert_close(out[b, t], expected[0], atol=1e-12, rtol=1e-12)


def test_no_expert_computes_a_token_that_it_does_not_see():
    own, x, counted = layer("switch", training=False), tokens(), []
    hooks = [
        expert.register_forward_hook(lambda module, given, out: counted.append(given[0].shape))
        for expert in own.experts
    ]
    own(x)
    sent = own.router(x.view(-1, DIM)).sent.sum(dim=0).tolist()
    assert counted == [(1, number, DIM) for number in sent] and sum(sent) == 22
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("router", ["switch[capacity=1.0]", "top_k", "base", "expert_choice", "soft"])
def test_padding_is_not_routed_and_takes_no_place(router):
    own, x = layer(router), tokens()
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, 7:] = valid[1, :3] = False
    torch.manual_seed(1)
    with routing.watch(own) as seen:
        out = own(x, valid)
    torch.manual_seed(1)
    alone = own(x[valid][None])
    assert_close([out[valid]], [alone[0]])
    assert [u.tokens for u in seen.passes] == [int(valid.sum())]
    assert not bool(out[~valid].abs().sum()) and gradients(out, x)[0][~valid].abs().sum() == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_a_batch_of_padding_alone_gives_zeros(router):
    own, nothing = layer(router), torch.zeros(2, 11, dtype=torch.bool)
    assert not bool(own(tokens(), nothing).abs().sum())
    with torch.no_grad():
        assert not bool(own.eval()(tokens(), nothing).abs().sum())


def test_a_dropped_token_keeps_its_residual_alone(tiny):
    block = build(tiny, norm="pre", router="switch[capacity=0.5]").train().blocks[0]
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    added = block.feed(x, Mask())
    sent = block.mlp.router(x.view(-1, 16)).sent.any(dim=-1).view(2, 9)
    assert 0 < int((~sent).sum()) < 18
    assert not bool(added[~sent].abs().sum()) and bool((added[sent] != 0).any(dim=-1).all())
    assert bool((block.eval().feed(x, Mask()) != 0).any(dim=-1).all())  # nothing is dropped in evaluation


def test_experts_without_tokens_have_gradients_too():
    own = layer("switch")
    torch.nn.init.zeros_(own.router.scores.weight)  # all the same: every token to the first
    own(tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in own.parameters())
    assert not any(bool(parameter.grad.any()) for expert in list(own.experts)[1:] for parameter in expert.parameters())


def test_choices_that_rounding_would_turn_stay_when_a_batch_is_computed_again():
    own, x, mask = layer("switch[balance=0.0]"), tokens(), Mask(decisions={})
    with torch.no_grad():
        out = own(x, None, mask)
        torch.nn.init.normal_(own.router.scores.weight, std=1e-9)
        flipped = own.router(x.view(-1, DIM)).sent != mask.decisions[own][0]
        assert bool(flipped.any())
        again = own(x, None, mask)
    same = ~flipped.any(dim=-1).view(2, 11)
    assert_close([again[~same]], [out[~same]])  # with the weights of before
    assert not torch.equal(again[same], out[same])  # the others have those of now


def test_half_precision_and_autocast(tiny):
    batch = labelled()
    for router in ("switch", "soft"):
        model = build(tiny, router=router).float().train()
        with torch.autocast("cpu", torch.bfloat16):
            model(**batch).loss.backward()
        assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
        assert model.bfloat16().eval()(**batch).logits.dtype == torch.bfloat16


# ---- what they cost ----


def test_flops_do_not_grow_with_the_number_of_experts(tiny):
    """Of a switch in evaluation: they differ by the product of the router's scores alone, 2 tokens dim experts in each
    layer."""
    n, sizes = 64, {**tiny, "dim": 32, "mlp": 128}
    ids = torch.randint(53, (2, n))

    def flops(experts):
        model = effzoo.build("bert", experts=experts, **sizes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=ids)
        parameters = sum(p.numel() for p in model.blocks.parameters())
        return counter.get_total_flops() - (2 * 2 * n * 32 * experts) * 2, parameters

    counted = {experts: flops(experts) for experts in (0, 2, 4, 8, 16)}
    assert len({number for number, _ in counted.values()}) == 1
    assert counted[16][1] > 8 * counted[0][1]


def test_flops_of_top_k_are_those_of_k_experts(tiny):
    own = layer("top_k[k=3]", training=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        own(tokens().detach())
    assert counter.get_total_flops() == 22 * (3 * 2 * 2 * DIM * 12 + 2 * DIM * EXPERTS)


# ---- in a model ----


def test_every_second_layer_and_what_stands_in_the_state_dict(tiny):
    model = build({**tiny, "layers": 4}, expert_every=2)
    assert [isinstance(block.mlp, Experts) for block in model.blocks] == [False, True, False, True]
    keys = [key for key in model.state_dict() if key.startswith("blocks.1.mlp.")]
    assert keys[0] == "blocks.1.mlp.router.scores.weight" and len(keys) == 1 + 4 * EXPERTS
    assert "blocks.1.mlp.experts.3.up.weight" in keys and "blocks.0.mlp.up.weight" in model.state_dict()
    roles = {site.role for path, site in sites(model) if ".experts." in path}
    assert roles == {"mlp.up", "mlp.down"} and {site.layer for path, site in sites(model) if ".experts." in path} == {
        1,
        3,
    }
    other = build({**tiny, "layers": 4}, expert_every=2)
    torch.nn.init.zeros_(other.blocks[1].mlp.router.scores.weight)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(**labelled()).logits, model.eval()(**labelled()).logits)


def test_without_experts_a_model_is_what_it_was(tiny):
    """No random number is drawn for experts, and the output has no entry of theirs."""
    model = build(tiny, experts=0).train()
    assert not any(isinstance(module, Experts) for module in model.modules())
    assert set(model(**labelled())) == {"loss", "logits", "last_hidden_state"}


def test_decoders_start_the_ends_of_their_experts_small(tiny):
    model = build({**tiny, "dim": 64, "mlp": 256}, "gpt2", "causal_lm")
    for expert in model.blocks[0].mlp.experts:
        assert float(expert.down.weight.detach().std()) == pytest.approx(0.02 / 2, rel=0.05)
        assert float(expert.up.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(model.blocks[0].mlp.experts[0].up.weight, model.blocks[0].mlp.experts[1].up.weight)


@pytest.mark.parametrize("router", ["switch[balance=0.5]", "top_k", "switch[balance=0.1, z=0.1]"])
def test_the_loss_of_training_is_that_of_the_task_and_what_balances_every_layer(tiny, router):
    model, batch, told = build(tiny, router=router).train(), labelled(), []
    hooks = [each.register_forward_hook(lambda module, given, out: told.append(out.loss)) for each in routers(model)]
    torch.manual_seed(3)
    out = model(**batch)
    assert len(told) == 2
    torch.testing.assert_close(out.balance_loss, told[0] + told[1])
    torch.testing.assert_close(
        out.loss - out.balance_loss, torch.nn.functional.cross_entropy(out.logits, batch["labels"])
    )
    assert next(iter(out)) == "loss"
    unlabelled = model(**{key: batch[key] for key in ("input_ids", "attention_mask")})
    assert unlabelled.loss is None and unlabelled.balance_loss is not None
    out = model.eval()(**batch)
    assert out.balance_loss is None and "balance_loss" not in out
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, batch["labels"]))
    for hook in hooks:
        hook.remove()


def learned(model, batch):
    torch.manual_seed(3)
    out = model(**batch)
    return out, torch.autograd.grad(out.loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


@pytest.mark.parametrize("shared", [0, 1], ids=["", "layers share a block"])
@pytest.mark.parametrize("router", ["switch", "top_k", "gumbel", "base", "expert_choice", "soft"])
def test_checkpointing_and_recomputation_change_no_gradient_and_count_the_loss_once(tiny, router, shared):
    model, batch = build({**tiny, "dropout": 0.1}, router=router, share_layers=shared).train(), labelled()
    plain, expected = learned(model, batch)
    model.gradient_checkpointing_enable()
    out, found = learned(model, batch)
    assert torch.equal(out.loss, plain.loss)
    assert_close(found, expected)
    model.gradient_checkpointing_disable()
    for level in ("hidden", "blocks"):
        model.recompute = level
        out, found = learned(model, batch)
        assert torch.equal(out.loss, plain.loss) and all(
            a is b or torch.equal(a, b) for a, b in zip(found, expected, strict=True)
        )


@pytest.mark.parametrize("router", ["switch", "top_k", "base", "expert_choice", "soft", "uniform"])
@pytest.mark.parametrize("training", [False, True])
def test_what_no_head_reads_is_left_out_where_that_changes_nothing(tiny, router, training):
    model, batch = build(tiny, router=router).train(training), labelled()
    plain, expected = learned(model, batch)
    model.only_what_is_read = True
    with routing.watch(model) as seen:
        out, found = learned(model, batch)
    assert_close(
        [out.loss, *(g if g is not None else torch.zeros(()) for g in found)],
        [plain.loss, *(g if g is not None else torch.zeros(()) for g in expected)],
    )
    spares = router in ("soft", "uniform") or (not training and router != "expert_choice")
    assert (seen.passes[-1].tokens == 3) == spares and (out.last_hidden_state is None) == spares


@pytest.mark.parametrize("router", ["soft", "gumbel", "base", "switch[balance=0.0]", "expert_choice"])
def test_reversible_residuals_give_the_gradients_of_plain_autograd(tiny, router):
    from effzoo.blocks import reversible

    model = build({**tiny, "dropout": 0.1}, norm="pre", residual="reversible", router=router).train()
    x = torch.randn(2, 9, 16, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (reversible.two_streams, reversible.reversible):
        torch.manual_seed(3)
        found.append(gradients(run(model.blocks, x, Mask(decisions={})), x, *model.blocks.parameters()))
    for mine, theirs in zip(*found, strict=True):  # where autograd finds no path there may be zeros
        torch.testing.assert_close(
            torch.zeros(()) if mine is None else mine.double(),
            torch.zeros(()) if theirs is None else theirs,
            atol=1e-10,
            rtol=1e-8,
        )


@pytest.mark.parametrize("router", ["switch[capacity=0.5]", "top_k", "base", "soft"])
def test_a_cache_changes_nothing(tiny, router):
    model = build(tiny, "gpt2", "causal_lm", router=router)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    mask = (torch.arange(9) >= torch.tensor([0, 4, 2])[:, None]).long()
    ids = torch.randint(1, 53, (3, 9)) * mask
    found = [
        effzoo.generate(
            model, ids, mask, use_cache=cached, max_new_tokens=8, output_logits=True, return_dict_in_generate=True
        )
        for cached in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    for cached, plain in zip(found[0].logits, found[1].logits, strict=True):
        assert (cached - plain).abs().max() < 1e-10


@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_every_attention_kind_learns_with_experts(tiny, kind):
    for name in ("bert", "gpt2") if not attention.get(kind).not_causal else ("bert",):
        out = build(tiny, name, attention=small(kind), router="top_k").train()(**labelled())
        out.loss.backward()
        assert bool(out.loss.isfinite()) and out.balance_loss is not None


@pytest.mark.slow
@pytest.mark.parametrize("router", ["switch", "top_k[k=2]", "base", "expert_choice", "gumbel", "soft"])
def test_training_lowers_the_loss_and_moves_the_router(tiny, router):
    model = build(tiny, router=router).train()
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 53, (32, 12), generator=draw)
    batch = {"input_ids": ids, "labels": ids[:, 0] % 3}
    before = [each.scores.weight.detach().clone() for each in routers(model)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert not any(torch.equal(a, b.scores.weight) for a, b in zip(before, routers(model), strict=True))


def test_the_balancing_loss_spreads_what_a_router_without_it_does_not(tiny):
    """Trained on the balancing loss alone, the share of the busiest expert falls."""
    shares = {}
    for balance in (0.0, 1.0):
        torch.manual_seed(2)
        own = routing.create(f"switch[balance={balance}, capacity=8.0]", DIM, EXPERTS)
        x = torch.randn(512, DIM) + 2.0  # a mean away from 0: some expert is preferred
        optimizer = torch.optim.Adam(own.parameters(), lr=0.02)
        for _ in range(100):
            loss = own(x).loss
            if loss is None:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        shares[balance] = max(routing.usage(own.eval()(x)).share)
    assert shares[1.0] < 0.35 < 0.6 < shares[0.0]


# ---- with adapters ----


@pytest.mark.parametrize("router", ["soft", "switch"])
def test_lora_hangs_on_every_expert_and_leaves_the_base_alone(tiny, router, tmp_path):
    model, batch = build(tiny, router=router).train(), labelled()
    effzoo.attach(model, "lora[targets=(mlp.up, mlp.down)]")
    hung = [path for path, site in sites(model) if site.adapters and site.role.startswith("mlp.")]
    assert len(hung) == 2 * EXPERTS * 2 and all(".experts." in path for path in hung)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert "blocks.0.mlp.router.scores.weight" in frozen
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and all(
        torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen
    )
    trained = model.eval()(**batch).logits
    effzoo.save_adapter(model, tmp_path)
    other = effzoo.load_adapter(build(tiny, router=router), tmp_path).eval()
    assert torch.equal(other(**batch).logits, trained)
    effzoo.merge(model)
    torch.testing.assert_close(model(**batch).logits, trained, atol=1e-10, rtol=1e-10)
    assert effzoo.account(other).by_role[0][2] == 2 * EXPERTS


def test_adapters_cannot_be_chosen_by_row_where_rows_are_mixed_by_a_router(tiny):
    model = build(tiny)
    for name in ("a", "b"):
        effzoo.attach(model, "lora[targets=(mlp.up)]", name=name)
    effzoo.activate(model, rows=["a", "b", "a"])
    with pytest.raises(IncompatibleError, match=r"mlp.up: adapters were chosen for 3 rows.+leave this role out"):
        model(**labelled())


# ---- upcycling ----


@pytest.mark.parametrize("router", ["top_k", "soft", "uniform", "gumbel"])
def test_experts_start_as_copies_of_the_dense_feed_forward(tiny, router):
    """Where the weights of a token add up to 1, the model computes what the dense one does (Komatsuzaki et al. 2022,
    section 2)."""
    config = transformers.BertConfig(
        vocab_size=53,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    source = transformers.BertModel(config).eval()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sizes = {**tiny, "layers": 2}
    dense = convert.load_pretrained(effzoo.build("bert", **sizes), source).eval()
    model = convert.load_pretrained(
        effzoo.build("bert", experts=3, router=router, expert_every=2, **sizes), source
    ).eval()
    batch = {key: value for key, value in labelled().items() if key != "labels"}
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(
        model(**batch).last_hidden_state[valid], dense(**batch).last_hidden_state[valid], atol=1e-5, rtol=1e-5
    )
    for expert in model.blocks[1].mlp.experts:
        assert torch.equal(expert.up.weight, dense.blocks[1].mlp.up.weight)


# ---- refusals ----


@pytest.mark.parametrize(
    ("name", "choices", "error", "said"),
    [
        (
            "gpt2",
            {"router": "expert_choice"},
            IncompatibleError,
            "chooses among all tokens, later ones as well, so a causal model",
        ),
        ("bert", {"router": "fixed"}, IncompatibleError, "reads the number of a task"),
        ("bert", {"router": "skills[tasks=3]"}, IncompatibleError, "reads the number of a task"),
        ("bert", {"norm": "pre", "residual": "reversible"}, IncompatibleError, "keeps no graph that would lead back"),
        ("bert", {"router": "switch[capasity=2]"}, OptionError, "did you mean 'capacity'"),
        ("bert", {"router": "top_k[k=5]"}, OptionError, "k is between 1 and the number of experts, 4, got 5"),
        ("bert", {"experts": -1}, OptionError, "experts is 0 or more"),
        ("bert", {"expert_every": 3}, OptionError, "expert_every from 1 to the number of layers, 2"),
        ("bert", {"expert_every": 0, "share_layers": 1}, OptionError, "expert_every is at least 1, got 0"),
        ("bert", {"expert_every": 2, "share_layers": 1}, OptionError, "differ in experts"),
        ("bert", {"experts": 0, "router": "top_k"}, OptionError, "mean nothing without experts"),
        ("bert", {"router": 3}, OptionError, "size 'router' of model 'bert' takes str"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(tiny, name, choices, error, said):
    with pytest.raises(error, match=said):
        build(tiny, name, **choices)


def test_transformers_has_no_counterpart(tiny):
    with pytest.raises(ConversionError, match="4 experts has no counterpart"):
        convert.to_transformers(build(tiny))


def test_a_plan_is_exact_or_refused(tiny):
    """Every expert sees every token: then shapes are enough, and the plan counts the bytes that autograd keeps."""
    with pytest.raises(
        IncompatibleError, match="how many tokens each expert gets depends on the values that router 'switch' scores"
    ):
        effzoo.plan("bert", batch=2, length=8, experts=4, **tiny)
    model = effzoo.build("bert", task="classification", num_labels=3, experts=3, router="soft", **tiny).train()
    batch = {"input_ids": torch.full((2, 8), 5), "labels": torch.tensor([0, 1])}
    held, own = {}, {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), *batch.values())}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch).loss  # noqa: B018
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in held.items() if pointer not in own)
    assert sum(effzoo.plan(model, inputs=batch).activations.values()) == real


def test_a_router_of_a_file_routes_feed_forwards(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom effzoo.routing import Router, Routing, register\n\n@register('first_token')\nclass "
        "First(Router):\n"
        "    def forward(self, x):\n        sent = torch.zeros(len(x), self.experts, dtype=torch.bool)\n        "
        "sent[:, 0] = True\n"
        "        return Routing(sent.to(x.dtype), sent, sent.to(x.dtype))\n"
    )
    with effzoo.scope():
        effzoo.load_file(tmp_path / "mine.py")
        model = build(tiny, router="first_token").train()
        with routing.watch(model) as seen:
            model(**labelled()).loss.backward()
    assert [u.share for u in seen.passes] == [(1.0, 0.0, 0.0, 0.0)] * 2 and seen.passes[0].collapsed


def test_a_ladder_cannot_start_from_slices_of_experts(tiny):
    model = effzoo.build("bert", **tiny, experts=2)
    with pytest.raises(OptionError, match="use init='random'"):
        effzoo.attach(model, "ladder[init=pruned, reduction=2]")
    effzoo.attach(model, "ladder[init=random, reduction=2]")
