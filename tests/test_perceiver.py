"""Perceivers: what they read, how often, with which weights; output queries; the causal variant; PEFT and training on
them."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import effzoo
from effzoo import registry
from effzoo.architectures import Perceiver, PerceiverConfig
from effzoo.architectures.perceiver_cross import LastPositions
from effzoo.attention.core import Context, Mask
from effzoo.checks.models import silent, train
from effzoo.errors import IncompatibleError, IncompatiblePeft, InputError, OptionError, TargetError

IO = {"channels": 16, "latents": 5, "head_dim": 4, "value_dim": 6, "cross_heads": 2, "cross_head_dim": 4,
      "cross_value_dim": 8, "decoder_heads": 2,
      "decoder_head_dim": 4, "decoder_value_dim": 8}  # fmt: skip
PIXELS = {
    "grid": (6, 7),
    "bands": 2,
    "latents": 5,
    "dim": 12,
    "layers": 2,
    "heads": 3,
    "mlp": 20,
    "cross_attends": 3,
    "attention_dropout": 0.0,
}
AR = {
    "causal": True,
    "latents": 5,
    "pooling": "last",
    "final_norm": True,
    "value_dim": 0,
    "cross_head_dim": 8,
    "cross_value_dim": 8,
    "head_dim": 8,
}


def text(tiny, **changes):
    """A tiny Perceiver IO on tokens, in float64, with weights larger than at a start."""
    return grown(effzoo.build("perceiver-io", **{**tiny, **IO, **changes}))


def pixels(**changes):
    return grown(effzoo.build("perceiver", **{**PIXELS, **changes}))


def grown(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3)
    return model.double().eval()


def ids(*shape):
    return torch.randint(2, 53, shape)


def numbers(model):
    return sum(parameter.numel() for parameter in model.parameters())


def assert_near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


# --- sizes


def test_published_numbers_of_parameters():
    """Perceiver IO on language: 201,108,230 with its decoder; Perceiver on ImageNet: 44.9 M, both with the head they
    were published with."""
    with torch.device("meta"):
        assert numbers(effzoo.build("perceiver-io", task="masked_lm")) == 201_108_230
        assert round(numbers(effzoo.build("perceiver", task="classification", num_labels=1000)) / 1e6, 1) == 44.9


def test_products_on_imagenet_are_the_published_ones():
    """707.2 GFLOPs with 50,176 pixels and eight cross-attentions; counted here are the matrix products alone, without
    norms and softmax."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        effzoo.build("perceiver", task="classification", num_labels=1000, backend="reference").eval()(
            inputs_embeds=torch.zeros(1, 224, 224, 3)
        )
    assert 0.995 * 707.2e9 < counter.get_total_flops() < 707.2e9


@pytest.mark.parametrize(("share_cross", "crosses"), [("none", 3), ("all_but_first", 2), ("all", 1)])
@pytest.mark.parametrize(("share_blocks", "blocks"), [("none", 6), ("all_but_first", 2), ("all", 1)])
def test_sharing_counts_each_weight_once(share_cross, crosses, share_blocks, blocks):
    model = pixels(share_cross=share_cross, share_blocks=share_blocks, blocks_per_cross=2)
    rest = model.latents.weight.numel()
    cross, block = numbers(model.cross[0]), sum(numbers(block) for block in model.blocks[:2])
    assert (len(model.cross), len(model.blocks)) == (crosses, 2 * blocks)
    assert numbers(model) == rest + crosses * cross + blocks * block


@pytest.mark.parametrize("share", ["all_but_first", "all"])
def test_shared_weights_compute_what_copies_compute_and_gather_their_gradients(share):
    shared, untied = pixels(share_cross=share, share_blocks=share), pixels(share_cross="none", share_blocks="none")
    untied.latents.load_state_dict(shared.latents.state_dict())
    for step, (cross, block) in enumerate(
        zip(shared.config.cross_schedule(), shared.config.block_schedule(), strict=True)
    ):
        untied.cross[step].load_state_dict(shared.cross[cross].state_dict())
        for layer in range(2):
            untied.blocks[2 * step + layer].load_state_dict(shared.blocks[2 * block + layer].state_dict())
    x = torch.randn(2, 6, 7, 3, dtype=torch.float64)
    outs = [model(inputs_embeds=x).last_hidden_state for model in (shared, untied)]
    assert_near(*outs)
    for out in outs:
        (out**3).sum().backward()
    total = sum(
        cross.attn.q.weight.grad for step, cross in enumerate(untied.cross) if shared.config.cross_schedule()[step] == 0
    )
    assert_near(shared.cross[0].attn.q.weight.grad, total)
    total = sum(
        untied.blocks[2 * step].mlp.up.weight.grad
        for step, block in enumerate(shared.config.block_schedule())
        if block == 0
    )
    assert_near(shared.blocks[0].mlp.up.weight.grad, total)


def test_the_order_is_cross_attention_then_its_blocks():
    model = pixels(share_cross="none", share_blocks="none", blocks_per_cross=2, layers=1)
    order = []
    for name, module in [*model.cross.named_children(), *((f"b{i}", b) for i, b in model.blocks.named_children())]:
        module.register_forward_hook(lambda *_, name=name: order.append(name))
    model(inputs_embeds=torch.randn(1, 2, 2, 3).double())
    assert order == ["0", "b0", "b1", "1", "b2", "b3", "2", "b4", "b5"]


def test_latents_do_not_grow_with_the_input():
    model, seen = pixels(grid=(64, 64)), set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape)))
    for axes in ((1, 1), (3, 5), (64, 64)):
        assert model(inputs_embeds=torch.randn(2, *axes, 3).double()).last_hidden_state.shape == (2, 5, 12)
    assert seen == {(2, 5, 12)}


# --- inputs


@pytest.mark.parametrize("positions", ["none", "learned", "fourier"])
def test_without_positions_the_order_of_the_inputs_means_nothing(positions):
    model = pixels(
        grid=(11,), positions=positions, bands=2 * (positions == "fourier"), position_dim=4 * (positions == "learned")
    )
    x, order, mask = torch.randn(2, 11, 3).double(), torch.randperm(11), torch.rand(2, 11) < 0.7
    out = model(inputs_embeds=x, attention_mask=mask).last_hidden_state
    permuted = model(inputs_embeds=x[:, order], attention_mask=mask[:, order]).last_hidden_state
    assert torch.allclose(out, permuted, rtol=0, atol=1e-12) == (positions == "none")
    assert out.std() > 0.1


@pytest.mark.parametrize("axes", [(9,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("positions", ["none", "learned", "fourier"])
def test_an_array_with_axes_is_the_row_of_its_entries_with_their_places_beside_them(axes, positions):
    """The same model without positions reads what the definition says: channels, then places."""
    rows = torch.tensor(axes) + 2
    grid = tuple(rows.tolist())
    model = pixels(
        grid=grid, positions=positions, bands=2 * (positions == "fourier"), position_dim=4 * (positions == "learned")
    )
    flat = pixels(grid=(200,), channels=model.config.width, positions="none", bands=0)
    flat.load_state_dict({key: value for key, value in model.state_dict().items() if "position" not in key})
    x = torch.randn(2, *axes, 3, dtype=torch.float64)
    entries = []
    for place in torch.cartesian_prod(*map(torch.arange, axes)).reshape(-1, len(axes)).tolist():
        value = [x[(slice(None), *place)]]
        if positions == "fourier":
            p = [2 * i / (size - 1) - 1 for i, size in zip(place, axes, strict=True)]
            f = [(1, most / 2) for most in grid]
            angles = torch.tensor(
                [[torch.pi * at * band for band in bands] for at, bands in zip(p, f, strict=True)], dtype=torch.float64
            ).flatten()
            value.append(torch.cat([torch.tensor(p, dtype=torch.float64), angles.sin(), angles.cos()]).expand(2, -1))
        if positions == "learned":
            row = 0
            for i, most in zip(place, grid, strict=True):
                row = row * most + i
            value.append(model.embeddings.position.weight[row].expand(2, -1))
        entries.append(torch.cat(value, dim=-1))
    expected = flat(inputs_embeds=torch.stack(entries, dim=1)).last_hidden_state
    assert_near(model(inputs_embeds=x).last_hidden_state, expected)


def test_learned_positions_of_tokens_are_added(tiny):
    model = text(tiny)
    tokens, rows = ids(2, 7), torch.randperm(64)[:7][None]
    embeds = model.embeddings.token.weight[tokens]
    assert_near(model(inputs_embeds=embeds).last_hidden_state, model(tokens).last_hidden_state)
    moved = embeds + model.embeddings.position.weight[rows] - model.embeddings.position.weight[:7]
    assert_near(model(inputs_embeds=moved).last_hidden_state, model(tokens, position_ids=rows).last_hidden_state)


@pytest.mark.parametrize("spec", [None, "prompt[length=2]|prefix[length=3]|lora|ia3|houlsby"])
@pytest.mark.parametrize("task", ["classification", "masked_lm", "token_classification", "features"])
def test_masked_inputs_are_invisible(tiny, task, spec):
    model = text(tiny, task=task)
    if spec is not None:
        effzoo.attach(model, spec)
    tokens, mask = ids(3, 11), torch.ones(3, 11, dtype=torch.long)
    mask[1, 6:] = 0
    mask[2, :10] = 0
    key = "last_hidden_state" if task == "features" else "logits"
    out = model(tokens, mask)[key]
    changed = torch.where(mask.bool(), tokens, ids(3, 11))
    assert model(changed, mask)[key].equal(out)
    alone = model(tokens[1:2, :6])[key]
    assert_near(out[1:2, :6] if task in ("masked_lm", "token_classification") else out[1:2], alone)
    x = torch.randn(3, 11, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((model(inputs_embeds=x, attention_mask=mask)[key] ** 3).sum(), x)
    assert gradient[mask == 0].abs().max() == 0 and gradient[mask == 1].abs().min() > 0


def test_a_mask_may_have_the_axes_of_the_array():
    model = pixels()
    x, mask = torch.randn(2, 4, 5, 3).double(), torch.rand(2, 4, 5) < 0.6
    assert_near(
        model(inputs_embeds=x, attention_mask=mask).last_hidden_state,
        model(inputs_embeds=x, attention_mask=mask.flatten(1)).last_hidden_state,
    )


# --- output queries


@pytest.mark.parametrize("task", ["masked_lm", "token_classification"])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_as_many_outputs_as_queries_each_on_its_own(tiny, task, n):
    model = text(tiny, task=task, num_labels=3)
    tokens = ids(2, n)
    every = model(tokens).logits
    assert every.shape == (2, n, 53 if task == "masked_lm" else 3)
    asked = torch.tensor([[0, n - 1, 0], [n // 2, 0, n - 1]])
    some = model(tokens, output_positions=asked).logits
    assert_near(some, torch.stack([every[row, asked[row]] for row in range(2)]))
    beyond = model(tokens, output_positions=torch.arange(64)[None]).logits
    assert beyond.shape[1] == 64
    assert_near(beyond[:, :n], every)
    assert_near(model(tokens, output_queries=model.decoder.queries.weight[None, :n]).logits, every)
    labels = torch.randint(3, (2, 3))
    loss = model(tokens, output_positions=asked, labels=labels).loss
    assert_near(loss, nn.functional.cross_entropy(some.flatten(0, 1), labels.flatten()))


def test_queries_follow_the_tokens_behind_prompt_rows_and_given_positions(tiny):
    model = text(tiny, task="masked_lm")
    tokens, rows = ids(2, 5), torch.tensor([[9, 3, 4, 60, 1]])
    assert_near(model(tokens, position_ids=rows).logits, model(tokens, position_ids=rows, output_positions=rows).logits)
    effzoo.attach(model, "prompt[length=4]")
    prompted = model(tokens).logits
    assert prompted.shape == (2, 5, 53)
    queries = model.decoder.queries.weight[None, 4:9]
    assert_near(prompted, model(tokens, output_queries=queries).logits)
    assert_near(prompted, model(tokens, output_positions=torch.arange(5)[None]).logits)
    with pytest.raises(InputError, match=r"output_positions are in \[0, 59\], got 0 to 60"):
        model(tokens, output_positions=torch.arange(61)[None])


def test_classification_by_the_mean_and_by_one_query(tiny):
    tokens, labels = ids(3, 9), torch.tensor([2, 0, 1])
    mean = text(tiny, task="classification", num_labels=3, pooling="mean", head_norm=True)
    out = mean(tokens, labels=labels)
    assert_near(out.logits, mean.head.out(mean.head.norm(out.last_hidden_state.mean(dim=1))))
    assert_near(out.loss, -out.logits.log_softmax(-1)[torch.arange(3), labels].mean())
    query = text(tiny, task="classification", num_labels=3)
    out = query(tokens)
    read = query.decoder.cross(query.decoder.queries.weight.expand(3, 1, -1), out.last_hidden_state, Mask())
    assert_near(out.logits, query.head.out(read[:, 0]))


# --- the causal variant


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (5, 5), (3, 13), (12, 13)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [0, 3])
def test_the_last_positions_see_what_came_before_them(m, n, padded, rows):
    core = LastPositions(Context(heads=2, head_dim=4, causal=True))
    q = torch.randn(2, 2, m, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, n, width, dtype=torch.float64, requires_grad=True) for width in (4, 6))
    memory = (torch.randn(2, rows, 4).double(), torch.randn(2, rows, 6).double()) if rows else None
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, : n - 1] = not padded
    found = []
    for compute in (core, core.dense):
        out = compute(q, k, v, mask=Mask(valid if padded else None), memory=memory)
        found.append((out, *torch.autograd.grad((out**3).sum(), (q, k, v))))
    for actual, expected in zip(*found, strict=True):
        assert_near(actual, expected)
    loop = []
    for i in range(m):  # the definition once more, one query at a time
        keys = [j for j in range(n - m + i + 1) if valid[0, j]]
        scores = (q[0, 0, i] * k[0, 0, keys]).sum(-1) / 2
        values = v[0, 0, keys]
        if rows:
            scores = torch.cat([(q[0, 0, i] * memory[0][0]).sum(-1) / 2, scores])
            values = torch.cat([memory[1][0], values])
        loop.append(scores.softmax(0) @ values)
    assert_near(found[0][0][0, 0], torch.stack(loop))


@pytest.mark.parametrize("n", [1, 4, 5, 6, 17])
@pytest.mark.parametrize("cross_attends", [1, 2])
def test_nothing_flows_back_from_the_future(tiny, n, cross_attends):
    model = text(tiny, task="causal_lm", cross_attends=cross_attends, **AR)
    x = torch.randn(1, n, 16, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=x).logits
    m = min(5, n)
    assert logits.shape == (1, m, 53)
    for i in range(m):
        (gradient,) = torch.autograd.grad((logits[0, i] ** 3).sum(), x, retain_graph=True)
        seen = gradient[0].abs().amax(dim=-1)
        assert seen[n - m + i + 1 :].eq(0).all() and seen[: n - m + i + 1].gt(0).all()


@pytest.mark.parametrize("length", [1, 3, 13])
def test_with_as_many_latents_as_positions_it_is_a_plain_decoder(tiny, length):
    """The cross-attention is then the first layer of a GPT-2 whose norm is that of queries and source alike."""
    model = text(tiny, task="causal_lm", lm_bias=False, **{**AR, "latents": 64})
    model.cross[0].source_norm.load_state_dict(model.cross[0].norm.state_dict())
    plain = grown(effzoo.build("gpt2", task="causal_lm", **{**tiny, "layers": 3, "head_dim": 8, "activation": "gelu"}))
    plain.embeddings.token.load_state_dict(model.embeddings.token.state_dict())
    plain.embeddings.position.load_state_dict(model.embeddings.position.state_dict())
    plain.final_norm.load_state_dict(model.final_norm.state_dict())
    first, cross = plain.blocks[0], model.cross[0]
    for mine, theirs in ((first.attn_norm, cross.norm), (first.mlp_norm, cross.mlp_norm), (first.mlp, cross.mlp)):
        mine.load_state_dict(theirs.state_dict())
    for name in ("q", "k", "v", "o"):
        getattr(first.attn, name).load_state_dict(getattr(cross.attn, name).state_dict())
    for mine, theirs in zip(plain.blocks[1:], model.blocks, strict=True):
        mine.load_state_dict(theirs.state_dict())
    tokens = ids(2, length)
    labels = tokens if length > 1 else None
    mine, theirs = model(tokens, labels=labels), plain(tokens, labels=labels)
    assert_near(mine.logits, theirs.logits)
    if labels is not None:
        assert_near(mine.loss, theirs.loss)
        mine.loss.backward()
        theirs.loss.backward()
        assert_near(model.embeddings.token.weight.grad, plain.embeddings.token.weight.grad)


def test_labels_of_the_whole_input_count_where_there_are_latents(tiny):
    model = text(tiny, task="causal_lm", **AR)
    tokens = ids(2, 12)
    out = model(tokens, labels=tokens)
    logs = out.logits.log_softmax(-1)
    assert_near(
        out.loss, -torch.stack([logs[row, j, tokens[row, 7 + j + 1]] for row in range(2) for j in range(4)]).mean()
    )


def test_labels_of_the_latents_alone_are_refused(tiny):
    with pytest.raises(InputError, match=r"labels are those of the whole input, \(2, 12\), got shape \(2, 5\)"):
        text(tiny, task="causal_lm", **AR)(ids(2, 12), labels=ids(2, 5))


def test_left_padding_with_position_ids_is_the_row_alone(tiny):
    model = text(tiny, task="causal_lm", **AR)
    tokens, mask = ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, :9] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(tokens, mask, position_ids=positions, labels=tokens.masked_fill(mask == 0, -100)).logits
    assert_near(out[0], model(tokens[:1]).logits[0])
    assert_near(out[1, 2:], model(tokens[1:, 9:]).logits[0])


def test_a_prompt_stands_before_everything_in_a_causal_model(tiny):
    model = text(tiny, task="causal_lm", **AR)
    effzoo.attach(model, "prompt[length=3]|prefix[length=2]")
    for n in (2, 9):
        assert model(ids(2, n)).logits.shape == (2, min(5, n), 53)


# --- attention kinds, PEFT, training


@pytest.mark.parametrize("name", effzoo.attention.names())
@pytest.mark.parametrize("causal", [False, True])
def test_every_attention_kind_works_among_the_latents(tiny, name, causal):
    cls = registry.attention.get(name)
    changes = {
        **(AR if causal else {}),
        "latents": 8,
        "head_dim": 8,
        "value_dim": 0,
        "task": "causal_lm" if causal else "masked_lm",
        "attention": name,
    }
    if causal and cls.not_causal:
        with pytest.raises(IncompatibleError, match="cannot be causal"):
            text(tiny, **changes)
        return
    model = text(tiny, **changes).train()
    tokens = ids(2, 13)
    model(tokens, labels=tokens).loss.backward()
    used = [p for key, p in model.blocks.named_parameters() if "global" not in key]
    assert used and all(p.grad is not None and p.grad.isfinite().all() for p in used)
    assert {core.name for core in model.cores()} == {name}


@pytest.mark.slow
@pytest.mark.parametrize("method", effzoo.peft.names())
@pytest.mark.parametrize("kind", ["text", "pixels", "causal"])
def test_every_method_trains_on_the_latent_blocks_and_leaves_the_base(tiny, method, kind, tmp_path):
    model = {
        "text": lambda: text(tiny, task="classification", num_labels=3),
        "pixels": lambda: pixels(task="classification", num_labels=3),
        "causal": lambda: text(tiny, task="classification", num_labels=3, **AR),
    }[kind]()
    batch = {"inputs_embeds": torch.randn(3, 6, 5, 3).double()} if kind == "pixels" else {"input_ids": ids(3, 9)}
    batch["labels"] = torch.tensor([0, 1, 2])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    refused = {
        "prompt": "pixels",
        "tokens": "pixels",
        "p_tuning": "pixels",
        "ipt": "pixels",
        "ladder": kind,
        "residual_adapter": kind,
        "pals": "causal",
        "boft": "pixels",  # whose 12 channels are not blocks of 8
    }
    if refused.get(method) == kind:
        said = "nothing in this model matches embed.token|does not work with|do not divide the 12 of 'attn.q'"
        with pytest.raises((TargetError, IncompatiblePeft, OptionError), match=said):
            effzoo.attach(model, method)
        return
    plain = model(**batch).logits
    effzoo.attach(model, method)
    if registry.peft.create(method).identity_at_init:
        assert_near(model(**batch).logits, plain, 1e-12)
    seen = train(model, batch)
    # a number added to all scores of a query changes nothing
    of_keys = (".k.adapters.default.full.own_bias", ".k.adapters.default.head.own_bias")
    # behind the last block, the first positions are not read: a causal model's last one is
    unread = "blocks.1.stream" if (method, kind) == ("loreft", "causal") else "none"
    seen = {key: value for key, value in seen.items() if not key.endswith(of_keys) and not key.startswith(unread)}
    assert silent(model, seen) == ""
    state = model.state_dict()
    assert all(state[key].equal(value) for key, value in before.items())
    trained = model(**batch).logits
    assert (trained - plain).abs().max() > 1e-4
    effzoo.save_adapter(model, tmp_path)
    assert effzoo.account(model).trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    effzoo.detach(model, "default")
    assert model(**batch).logits.equal(plain)
    effzoo.load_adapter(model, tmp_path)
    assert model.eval()(**batch).logits.equal(trained)


@pytest.mark.parametrize("task", ["features", "classification", "token_classification", "masked_lm"])
def test_roles_say_which_weights_come_pretrained(tiny, task):
    """Default targets hit the latent blocks; cross-attention, latents and a pretrained decoder have roles of their own;
    a new decoder is a head."""
    model = text(tiny, task=task)
    roles = set(effzoo.peft.roles(model))
    assert {
        "attn.q",
        "attn.memory",
        "attn.branch",
        "mlp.down",
        "cross.q",
        "cross.mlp.up",
        "cross.source_norm",
        "latents",
        "embed.token",
    } <= roles
    assert ("decoder.queries" in roles) == (task == "masked_lm") and ("head.queries" in roles) == task.endswith(
        "classification"
    )
    effzoo.attach(model, "lora")
    hung = {role for _, role in effzoo.attached(model)["default"].places["lora"]}
    assert hung == {"attn.q", "attn.v"}
    trained = {name.split(".adapters")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.startswith("decoder.") for name in trained) == task.endswith("classification")


def test_lora_merges_and_the_cross_attention_is_a_target_of_its_own(tiny):
    model = text(tiny, task="masked_lm")
    tokens = ids(2, 9)
    effzoo.attach(model, {"name": "lora", "targets": ("cross.q", "cross.v", "attn.q", "decoder.v")})
    train(model, {"input_ids": tokens, "labels": tokens})
    out = model(tokens).logits
    effzoo.merge(model, "default")
    assert_near(model(tokens).logits, out)


@pytest.mark.parametrize(
    "changes",
    [{}, {"share_blocks": "none", "cross_attends": 2}, {"attention": "lsh[chunk=4, buckets=8]", "latents": 32}],
)
def test_checkpointed_activations_give_the_same_gradients(tiny, changes):
    found = []
    model = text(
        tiny, task="masked_lm", blocks_per_cross=2, **{"latents": 8, **changes, "head_dim": 8, "value_dim": 0}
    ).train()
    tokens = ids(2, 9)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1]) and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "pixels", "causal"])
def test_it_compiles_whole(tiny, kind):
    model = (
        pixels()
        if kind == "pixels"
        else text(tiny, task="causal_lm", **AR)
        if kind == "causal"
        else text(tiny, task="masked_lm")
    )
    batch = (
        {"inputs_embeds": torch.randn(2, 3, 4, 3).double()}
        if kind == "pixels"
        else {"input_ids": ids(2, 9), "attention_mask": torch.ones(2, 9)}
    )
    key = "last_hidden_state" if kind == "pixels" else "logits"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(**batch)[key], model(**batch)[key])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_stays_near(tiny, dtype):
    model = text(tiny, task="masked_lm")
    tokens = ids(2, 9)
    exact = model(tokens).logits
    # a few units of rounding over five sub-layers
    size = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 1e-5}[dtype]
    out = copy.deepcopy(model).to(dtype)(tokens).logits
    assert out.dtype == dtype and (out.double() - exact).abs().max() < size * exact.abs().max()


def test_finetune_and_predict_run_on_tokens(tiny, tmp_path):
    torch.manual_seed(0)
    model = effzoo.build("perceiver-io", task="classification", peft="lora[rank=4]", **{**tiny, **IO})
    rows = [{"input_ids": [5 + row % 2] * (3 + row % 5), "labels": row % 2} for row in range(32)]
    result = effzoo.finetune(
        model, rows, output_dir=tmp_path, epochs=20, batch_size=8, learning_rate=2e-2, progress=False, evaluate=rows
    )
    assert result.metrics["eval_loss"] < 0.1
    logits = effzoo.predict(model, rows, progress=False)
    assert logits.argmax(-1).tolist() == [row["labels"] for row in rows]


def test_finetune_labels_tokens_and_bytes(tiny, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8][: 1 + row % 4], "labels": [1, 0, 1, 0][: 1 + row % 4]} for row in range(8)]
    for task in ("token_classification", "masked_lm"):
        model = effzoo.build("perceiver-io", task=task, peft="lora", **{**tiny, **IO})
        result = effzoo.finetune(
            model, rows, output_dir=tmp_path / task, max_steps=3, batch_size=4, progress=False, recompute="blocks"
        )
        assert result.steps == 3


# --- what it refuses


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("perceiver-io", {"latents": 0}, OptionError, "latents is at least 1, got 0"),
        ("perceiver-io", {"latnts": 3}, OptionError, r"no size 'latnts'; did you mean 'latents'\?"),
        (
            "perceiver-io",
            {"grid": (8, 8), "max_length": 64},
            OptionError,
            r"tokens and causal models have one axis, the grid \(8, 8\) has 2",
        ),
        (
            "perceiver-io",
            {"causal": True, "pooling": "mean"},
            OptionError,
            "channels 768 and dim 1280 have to be equal",
        ),
        ("perceiver-io", {"bands": 3}, OptionError, "bands are for positions='fourier'"),
        (
            "perceiver-io",
            {"task": "causal_lm"},
            IncompatibleError,
            "perceiver-io is an encoder, so task='causal_lm' makes no sense",
        ),
        ("perceiver-io", {"share_blocks": "some"}, OptionError, "share_blocks is 'none' or 'all_but_first' or 'all'"),
        ("perceiver", {"max_length": 64}, OptionError, r"grid \(224, 224\) has 50176 positions, max_length is 64"),
        (
            "perceiver",
            {"task": "masked_lm"},
            IncompatibleError,
            "reads arrays of numbers, so task='masked_lm' has no vocabulary",
        ),
        (
            "perceiver",
            {"task": "token_classification"},
            OptionError,
            "query_dim 3 does not divide into 8 decoder_heads",
        ),
        ("perceiver", {"bands": 0}, OptionError, "bands are for positions='fourier', which needs at least 1"),
        ("perceiver", {"heads": 7}, OptionError, "dim 1024 does not divide into 7 heads"),
        (
            "perceiver",
            {"cross_heads": 7},
            OptionError,
            "261 wide does not divide into 7 cross_heads; give cross_head_dim",
        ),
        ("perceiver", {"attention": ("full",) * 3}, OptionError, "3 attention specs for 6 layers"),
    ],
)
def test_build_says_what_it_cannot_build(name, changes, error, said):
    with pytest.raises(error, match=said), torch.device("meta"):
        effzoo.build(name, **changes)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        (
            {"input_ids": ids(2, 5)},
            r"perceiver reads arrays of numbers: give inputs_embeds \[batch, 6, 7, 3\], not input_ids",
        ),
        ({}, r"give inputs_embeds \[batch, 6, 7, 3\]"),
        (
            {"inputs_embeds": torch.zeros(2, 5, 3)},
            r"float tensor \[batch, 6, 7 at most, 3\], the channels last, got torch.float32 of shape \(2, 5, 3\)",
        ),
        (
            {"inputs_embeds": torch.zeros(2, 5, 8, 3)},
            r"an input of 5, 8 does not fit into the grid of 6, 7; build the model with grid=\(5, 8\)",
        ),
        ({"inputs_embeds": torch.zeros(2, 5, 0, 3)}, "does not fit"),
        (
            {"inputs_embeds": torch.zeros(2, 5, 5, 3), "attention_mask": torch.ones(2, 5)},
            r"attention_mask has shape \(2, 5\), the input needs \(2, 5, 5\)",
        ),
        (
            {"inputs_embeds": torch.zeros(2, 5, 5, 3), "attention_mask": torch.full((2, 25), 2)},
            "attention_mask holds 0 and 1",
        ),
        ({"inputs_embeds": torch.zeros(2, 5, 5, 3), "position_ids": torch.zeros(2, 25)}, "has positions='fourier'"),
        (
            {"inputs_embeds": torch.zeros(2, 5, 5, 3), "output_positions": torch.zeros(1, 1)},
            "output queries are for a Perceiver with a label per token",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_numbers(inputs, said):
    with pytest.raises(InputError, match=said):
        pixels()(**inputs)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": ids(2, 65)}, "65 tokens do not fit into max_length 64"),
        ({"input_ids": torch.full((1, 3), 53)}, r"input_ids are in \[0, 53\)"),
        ({"inputs_embeds": torch.zeros(2, 5, 8)}, r"\[batch, n, 16\]"),
        ({"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 6)}, "attention_mask has shape"),
        ({"input_ids": ids(2, 5), "position_ids": torch.full((2, 5), 64)}, r"position_ids are in \[0, 63\]"),
        (
            {"input_ids": ids(2, 5), "output_positions": torch.full((1, 2), 64)},
            r"output_positions are in \[0, 63\], got 64 to 64",
        ),
        (
            {"input_ids": ids(2, 5), "output_positions": torch.zeros(2)},
            r"integer tensor \[batch or 1, queries\], got torch.float32 of shape \(2,\)",
        ),
        ({"input_ids": ids(2, 5), "output_positions": ids(3, 2)}, "output_positions has 3 rows, the input 2"),
        (
            {"input_ids": ids(2, 5), "output_queries": torch.zeros(1, 2, 9)},
            r"float tensor \[batch or 1, queries, 16\], got torch.float32 of shape",
        ),
        ({"input_ids": ids(2, 5), "output_queries": torch.zeros(1, 2, 16), "output_positions": ids(1, 2)}, "not both"),
        ({"input_ids": ids(2, 5), "labels": ids(2, 4)}, r"labels are integers of shape \(2, 5\)"),
    ],
)
def test_tokens_and_queries_that_do_not_fit_are_refused_with_numbers(tiny, inputs, said):
    with pytest.raises(InputError, match=said):
        text(tiny, task="masked_lm")(**inputs)


def test_a_toml_of_ones_own_builds_a_perceiver(tmp_path):
    file = tmp_path / "sound.toml"
    file.write_text(
        'layout = "perceiver"\narchitecture = "perceiver"\nchannels = 1\nmax_length = 40\npositions = '
        '"fourier"\nbands = 4\nlatents = 3\n'
        "dim = 8\nlayers = 1\nheads = 2\nmlp = 8\n"
    )
    model = effzoo.build(str(file), task="classification", num_labels=4)
    assert isinstance(model, Perceiver) and isinstance(model.config, PerceiverConfig) and model.config.name == "sound"
    assert model(inputs_embeds=torch.randn(2, 33, 1)).logits.shape == (2, 4)
