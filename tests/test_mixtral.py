"""Mixtral and Qwen3-MoE: routing, weights and the loss that balances experts over all layers are those of
transformers."""

import pytest
import torch
import transformers

import effzoo
from effzoo import convert
from effzoo.blocks import Experts, FeedForward
from effzoo.errors import ConversionError, OptionError
from effzoo.routing import create
from effzoo.routing.router import Shares, joint_loss

_SIZES = {
    "vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "output_router_logits": True, "router_aux_loss_coef": 0.3,
}  # fmt: skip
MADE = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "one expert": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "qwen3": ("Qwen3Moe", {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 8}),
    "qwen3, dense layers": (
        "Qwen3Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 2,
         "norm_topk_prob": True},
    ),
}  # fmt: skip


def model(name, **more):
    family, sizes = MADE[name]
    config = getattr(transformers, f"{family}Config")(**_SIZES | sizes | more)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if key.endswith("norm.weight") else 0.0, 0.4)
    return theirs


def batch():
    ids = torch.randint(1, 37, (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 8:] = mask[2, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("name", MADE)
def test_losses_and_gradients_of_training_equal_transformers_both_ways(name):
    """With padding, which routers do not count; gradients of every tensor."""
    torch.manual_seed(0)
    theirs = model(name).train()
    ours = convert.from_transformers(theirs)
    back = convert.to_transformers(ours)
    assert all(value.equal(back.state_dict()[key]) for key, value in theirs.state_dict().items())
    assert back.config.to_dict() == theirs.config.to_dict() | {"head_dim": back.config.head_dim} | {
        key: back.config.to_dict()[key] for key in ("architectures", "classifier_dropout", "dtype")
    }
    given, results = batch(), []
    for each in (theirs, ours, back):
        out = each(**given)
        out.loss.backward()
        results.append(out.loss.detach())
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results[2], results[0])
    layout = convert.layouts.LAYOUTS[theirs.config.model_type]
    of_theirs = {key: parameter.grad for key, parameter in theirs.named_parameters()}
    of_ours = {key: parameter.grad for key, parameter in ours.named_parameters()}
    expected = convert.keymap.to_ours(layout.rules(ours.config, "causal_lm", "causal_lm"), of_theirs)
    assert expected.keys() >= of_ours.keys()
    for key, grad in of_ours.items():
        torch.testing.assert_close(
            grad, expected[key], atol=1e-6, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert of_ours["blocks.1.mlp.router.scores.weight"].abs().max() > 1e-4
    plain = theirs(**given, output_router_logits=False).loss
    assert results[0] - plain > 0.1  # the loss of the experts is a part of it


def test_the_loss_over_all_layers_is_that_of_their_tokens_together():
    torch.manual_seed(1)
    scores = [torch.randn(n, 5, dtype=torch.float64).requires_grad_() for n in (7, 4)]
    shares = []
    for each in scores:
        p = each.softmax(dim=-1)
        sent = torch.zeros_like(p).scatter(-1, p.topk(2, dim=-1).indices, 1.0)
        shares.append(Shares(sent.sum(0), p.sum(0), len(p), 0.7))
    found = joint_loss(shares)
    p = torch.cat(scores).softmax(dim=-1)
    f = torch.zeros_like(p).scatter(-1, p.topk(2, dim=-1).indices, 1.0).mean(dim=0)
    expected = 0.7 * 5 * sum(f[i] * p[:, i].mean() for i in range(5))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad(found, scores), torch.autograd.grad(expected, scores), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    theirs = transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func(tuple(scores), 5, 2)
    torch.testing.assert_close(found / 0.7, theirs.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalise", [True, False])
def test_weights_are_those_of_the_best_of_a_softmax_over_all(normalise):
    torch.manual_seed(2)
    router = create(f"top_k[k=2, noise=false, importance=0, load=0, normalise={str(normalise).lower()}]", 6, 4).double()
    experts = Experts([FeedForward(6, 8, "silu", 0, gated=True) for _ in range(4)], 6, "switch", causal=True).double()
    experts.router = router
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    p = (x @ router.scores.weight.T).softmax(dim=-1)
    best, which = p.topk(2, dim=-1)
    best = best / best.sum(dim=-1, keepdim=True) if normalise else best
    expected = torch.zeros_like(x)
    for row in range(2):
        for place in range(5):
            for weight, expert in zip(best[row, place], which[row, place], strict=True):
                expected[row, place] += weight * experts.experts[expert](x[row : row + 1, place : place + 1])[0, 0]
    torch.testing.assert_close(experts.eval()(x), expected, rtol=0, atol=1e-12)
    assert router.train()(x.flatten(0, 1)).loss is None


def test_routed_adapters_balance_each_router_by_itself():
    torch.manual_seed(3)
    sizes = {"layers": 1, "dim": 16, "heads": 2, "mlp": 24, "vocab": 23, "max_length": 16}
    router = "top_k[k=2, noise=false, importance=0, load=0, balance=0.5]"
    peft = f"routed[of='lora[rank=2]', experts=3, router='{router}', level='token']"
    model = effzoo.build("bert", peft=peft, task="classification", **sizes).train()
    model(torch.randint(2, 23, (2, 9)))
    routed = [module for module in model.modules() if type(module).__name__ == "Routed"]
    # N sum_i f_i P_i is about k where all are used alike, and each site has its share of the weight
    assert 0.5 < sum(float(module.pending.loss) for module in routed) < 2.0
    out = create(router, 16, 3).train()(torch.randn(9, 16))
    assert out.alone > 0 and out.loss == 0 and out.alone == joint_loss([out.shares])


@pytest.mark.parametrize("name", ["mixtral", "qwen3"])
def test_a_folder_is_read_with_its_experts_and_texts_are_continued_as_theirs(name, tmp_path):
    torch.manual_seed(4)
    theirs = model(name).eval()
    theirs.save_pretrained(tmp_path)
    ours = convert.from_transformers(tmp_path).eval()
    ids = torch.randint(1, 37, (2, 7))
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-4)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(effzoo.generate(ours, ids, max_new_tokens=6), expected)


@pytest.mark.parametrize(("changes", "said"), [
    ({"router": "switch"}, "routes by top_k.noise=false, importance=0, load=0."),
    ({"router": "top_k[k=2]"}, "routes by top_k.noise=false, importance=0, load=0."),
    ({"router": "top_k[k=2, noise=false, importance=0, load=0, normalise=false]"}, "weights that add up to 1"),
    ({"expert_mlp": 6}, "one width of the feed-forward"),
    ({"expert_every": 2}, "no counterpart for expert_every=2: it has 1"),
    ({"experts": 0, "router": "switch"}, "mixtral of transformers has experts, and this model none"),
])  # fmt: skip
def test_what_mixtral_of_transformers_lacks_is_refused(changes, said):
    sizes = {
        "layers": 2,
        "dim": 16,
        "heads": 2,
        "kv_heads": 1,
        "mlp": 24,
        "vocab": 23,
        "max_length": 16,
        "pad_token": 0,
    }
    ours = effzoo.build("mixtral", **sizes | {"experts": 4} | changes)
    with pytest.raises(ConversionError, match=said):
        convert.to_transformers(ours)


def test_another_number_of_experts_and_layers_without_any_are_refused():
    theirs = model("mixtral")
    with pytest.raises(ConversionError, match="holds 4 experts, and the model has 3; build it with experts=4"):
        convert.from_transformers(theirs, experts=3)
    with pytest.raises(ConversionError, match="mlp_only_layers"):
        convert.from_transformers(model("qwen3", mlp_only_layers=[1]))
    with pytest.raises(ConversionError, match="router_jitter_noise"):
        convert.from_transformers(model("mixtral", router_jitter_noise=0.1))
    with pytest.raises(OptionError, match="expert_mlp=5 mean nothing without experts"):
        effzoo.build("llama", expert_mlp=5)
