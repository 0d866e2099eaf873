"""What is trained is float32 whatever the base is, and the model goes on in the base's dtype."""

import copy

import pytest
import torch
from support import labelled, module, small

import effzoo
from effzoo.errors import EffzooError, IncompatibleError, OptionError
from effzoo.peft.merging import merged_parameters
from effzoo.sites import sites
from effzoo.sites.dtypes import decoding, linear

LATENTS = {
    "dim": 16,
    "layers": 2,
    "latents": 5,
    "heads": 2,
    "mlp": 16,
    "vocab": 53,
    "max_length": 64,
    "head_dim": 8,
    "value_dim": 8,
}
HALVES = (torch.bfloat16, torch.float16)


def bases(tiny):
    """An encoder, a decoder, a reversible model, one with grouped rotary heads and a Perceiver, by name."""
    encoder = {"task": "classification", "num_labels": 3, **tiny}
    yield effzoo.build("bert", attention=small("longformer"), **encoder)
    yield effzoo.build("gpt2", attention=small("lsh"), task="classification", num_labels=3, **tiny)
    yield effzoo.build("bert", norm="pre", residual="reversible", **encoder)
    yield effzoo.build("llama", kv_heads=1, head_dim=8, **encoder)
    yield effzoo.build(
        "perceiver-io", task="classification", num_labels=3, dropout=0.0, attention_dropout=0.0, **LATENTS
    )


def attached(model, method):
    """The model with the method, or None where they do not go together."""
    try:
        return effzoo.attach(model, method)
    except EffzooError:
        return None


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def one_step(model, rate=1e-2):
    """The gradients of a labelled batch, and the trained tensors after a step of SGD."""
    torch.manual_seed(4)
    model.train()
    optimizer = torch.optim.SGD(trained(model).values(), lr=rate)
    effzoo.peft.loss(model, **labelled()).backward()
    gradients = {name: parameter.grad for name, parameter in trained(model).items() if parameter.grad is not None}
    optimizer.step()
    return gradients, {name: parameter.detach() for name, parameter in trained(model).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [*effzoo.peft.names(), "routed[of=prefix]", "routed[of='lora|ia3', router=switch]", "lora[init=pissa]|norms"],
)
def test_what_is_trained_on_a_half_base_is_float32(tiny, method):
    """And its gradients; the model's outputs stay in the base's dtype, before and after `finish`, and in evaluation."""
    tried = 0
    for number, model in enumerate(bases(tiny)):
        half = HALVES[number % 2]
        model = attached(model.to(half), method)
        if model is None:
            continue
        tried += 1
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
        batch = labelled()
        out = model.train()(**batch)
        assert (out.logits.dtype, out.loss.dtype) == (half, torch.float32)
        gradients, _ = one_step(model)
        assert gradients and all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients.values())
        effzoo.peft.finish(model)
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        assert logits.dtype == half and bool(logits.isfinite().all())
        assert {p.dtype for p in trained(model).values()} <= {torch.float32}
    assert tried or method == "residual_adapter"


def test_a_convolution_in_half_precision_has_float32_adapters():
    model = torch.nn.Sequential(effzoo.sites.Conv2d(3, 4, 3, padding=1, role="conv")).to(torch.bfloat16)
    for spec in ("lora[targets=conv]", "residual_adapter", "residual_adapter[form=parallel]"):
        effzoo.attach(model, spec)
        y = model(torch.randn(2, 3, 6, 6, dtype=torch.bfloat16))
        y.float().square().mean().backward()
        assert y.dtype == torch.bfloat16 and {p.dtype for p in trained(model).values()} == {torch.float32}
        effzoo.detach(model, "default")


def test_a_float64_base_has_float64_adapters_and_a_quantised_one_float32(tiny):
    assert {p.dtype for p in trained(effzoo.attach(effzoo.build("bert", **tiny).double(), "lora|norms")).values()} == {
        torch.float64
    }
    for bits in (8, 4):
        for method in ("lora", "dora", "bitfit", "houlsby", "prefix", "supermask"):
            model = effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16)
            effzoo.quantise(model, bits=bits)
            gradients, _ = one_step(effzoo.attach(model, method))
            assert {g.dtype for g in gradients.values()} == {torch.float32}


@pytest.mark.parametrize(
    "method",
    [
        "lora",
        "dora",
        "ia3",
        "houlsby",
        "prefix",
        "prompt",
        "full",
        "bitfit",
        "norms",
        "diff",
        "routed",
        "fusion",
        "ladder",
    ],
)
def test_gradients_are_those_of_the_float32_base(tiny, method):
    """To the accuracy of a forward pass in bfloat16: on the same weights, those of the half base in float32."""
    torch.manual_seed(0)
    half = effzoo.build("bert", task="classification", num_labels=3, **{**tiny, "dim": 32}).to(torch.bfloat16)
    wide = copy.deepcopy(half).float()
    state = torch.get_rng_state()
    effzoo.attach(half, method)
    torch.set_rng_state(state)
    effzoo.attach(wide, method)
    wide.load_state_dict(half.state_dict())
    (found, after), (wanted, expected) = one_step(half), one_step(wide)
    assert found.keys() == wanted.keys()
    whole, true = (torch.cat([g.flatten() for g in gradients.values()]) for gradients in (found, wanted))
    assert (whole - true).norm() < 0.05 * true.norm()  # 8 bits of mantissa through two blocks
    moved = torch.cat([(after[name] - expected[name]).flatten() for name in expected])
    assert moved.norm() < 0.05 * 1e-2 * true.norm() + 1e-7


def test_small_updates_arrive(tiny):
    """AdamW at 2e-5 moves an entry by at most 2e-5, a thousandth of what bfloat16 can tell apart at 0.1."""
    model = effzoo.attach(
        effzoo.build("llama", kv_heads=1, head_dim=8, task="causal_lm", **tiny).to(torch.bfloat16), "lora"
    )
    start = {name: p.detach().clone() for name, p in trained(model).items() if name.endswith(".A")}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=2e-5, weight_decay=0)
    ids = labelled()["input_ids"]
    for _ in range(40):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = [float((trained(model)[name] == before).double().mean()) for name, before in start.items()]
    assert max(kept) < 0.01
    largest = max(float((trained(model)[name].detach() - before).abs().max()) for name, before in start.items())
    assert 1e-4 < largest < 1.2e-3


@pytest.mark.parametrize(
    "method", ["lora", "dora", "ia3", "full", "krona", "fish", "bitfit", "norms", "head_pruning", "intrinsic[dim=20]"]
)
def test_merging_rounds_the_sum_once(tiny, method):
    """W + delta in float64, of the float32 adapter, then rounded to bfloat16; and taken out again bit by bit."""
    model = effzoo.attach(effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16), method)
    one_step(model, rate=0.1)
    effzoo.peft.finish(model)
    wanted = {}
    for path, site in sites(model):
        if "default" in site.adapters:
            for key, value in merged_parameters(site, list(site.hung("default"))).items():
                wanted[f"{path}.{key}"] = value
    assert any(bool((value != value.to(torch.bfloat16).double()).any()) for value in wanted.values())
    before = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    effzoo.merge(model)
    merged = model.state_dict()
    for key, value in wanted.items():
        assert merged[key].dtype == torch.bfloat16 and torch.equal(merged[key], value.to(torch.bfloat16))
    effzoo.unmerge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert {p.dtype for p in trained(model).values()} == {torch.float32}


@pytest.mark.parametrize("method", ["lora", "lora[dropout=0.2]", "ia3", "houlsby", "full", "dora", "mam"])
def test_what_is_recomputed_is_the_same_to_the_bit(tiny, method):
    model = effzoo.attach(
        effzoo.build("bert", task="classification", num_labels=3, **{**tiny, "dropout": 0.1}).to(torch.bfloat16), method
    )
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    found = {}
    for level in ("nothing", "hidden", "blocks"):
        model.recompute = level
        model.zero_grad()
        torch.manual_seed(3)
        model.train()(**labelled()).loss.backward()
        found[level] = {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}
    first = found["nothing"]
    assert first and all(
        other.keys() == first.keys() and all(torch.equal(other[name], first[name]) for name in first)
        for other in found.values()
    )


def test_autocast_over_a_half_base(tiny):
    """Under autocast the tensors that are trained stay float32, and so do their gradients."""
    for method in (
        "lora",
        "ia3",
        "houlsby",
        "unipelt",
        "full",
        "routed[of=houlsby]",
        "fusion",
        "far",
        "krona_res",
        "ladder",
    ):
        model = effzoo.attach(
            effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16), method
        )
        with torch.autocast("cpu", torch.bfloat16):
            gradients, _ = one_step(model)
        assert {g.dtype for g in gradients.values()} == {torch.float32} and all(
            bool(g.isfinite().all()) for g in gradients.values()
        )


def test_the_dtype_of_an_adapter_can_be_asked_for(tiny):
    sizes = {"task": "classification", "num_labels": 3, **tiny}
    model = effzoo.build("bert", peft="lora|houlsby", adapter_dtype="bfloat16", **sizes)
    assert {p.dtype for p in trained(model).values()} == {torch.bfloat16}
    assert model(**labelled()).logits.dtype == torch.float32  # the base's
    effzoo.attach(model, "lora", name="wide")
    effzoo.activate(model, "default", "wide")  # two dtypes on one site
    gradients, _ = one_step(model)
    assert {g.dtype for g in gradients.values()} == {torch.float32, torch.bfloat16}
    for wrong in ("int8", torch.int64, "float99"):
        with pytest.raises(OptionError, match="dtype is a floating-point type such as"):
            effzoo.attach(model, "lora", name="other", dtype=wrong)


def test_a_cast_model_is_cast_whole_and_finetune_says_so(tiny):
    """`model.to` casts adapters as torch casts everything; `recast` makes them what attach makes, and nothing else is
    touched."""
    sizes = {"task": "classification", "num_labels": 3, **tiny}
    rows = [{"input_ids": [5, 6, 7], "labels": 1}, {"input_ids": [8, 9], "labels": 0}]
    for half in HALVES:
        model = effzoo.build("bert", peft="lora", **sizes).to(half)
        assert {p.dtype for p in trained(model).values()} == {half}
        assert model(**labelled()).logits.dtype == half
        with pytest.raises(
            IncompatibleError,
            match=r"is trained in b?float16, where small updates vanish; call effzoo.peft.recast\(model\)",
        ):
            effzoo.finetune(model, rows, output_dir="unused", max_steps=1)
        kept = module(model, "blocks.0.attn.q", "lora").A.detach().float()
        effzoo.peft.recast(model)
        assert {p.dtype for p in trained(model).values()} == {torch.float32}
        assert (
            torch.equal(module(model, "blocks.0.attn.q", "lora").A, kept)
            and model.embeddings.token.weight.dtype == half
        )
        assert model(**labelled()).logits.dtype == half
    with pytest.raises(
        IncompatibleError, match=r"call model.float\(\) and give precision='bfloat16', or attach an adapter"
    ):
        effzoo.finetune(effzoo.build("bert", **sizes).to(torch.bfloat16), rows, output_dir="unused", max_steps=1)


def test_finetune_trains_adapters_of_a_half_base(tiny, tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8 + i], "labels": i % 3} for i in range(6)]
    for dtype, name in ((None, "wide"), (torch.bfloat16, "meant")):
        model = effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16)
        effzoo.attach(model, "lora", dtype=dtype)
        effzoo.finetune(model, rows, output_dir=tmp_path / name, max_steps=2, batch_size=3)
        assert {p.dtype for p in trained(model).values()} == {dtype or torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora|ia3|dora[targets=attn.k]", "mam|norms"])
def test_a_half_base_with_float32_adapters_is_one_graph(tiny, method):
    """`torch.compile(fullgraph=True)`, traced, gives the same numbers and gradients."""
    model = effzoo.build("bert", task="classification", num_labels=3, **{**tiny, "layers": 1}).to(torch.bfloat16)
    effzoo.attach(model, method)
    batch = {key: value for key, value in labelled().items() if key != "labels"}
    found = {}
    for name, run in (("plain", model), ("traced", torch.compile(model, backend="eager", fullgraph=True))):
        model.zero_grad()
        run(**batch).logits.float().square().mean().backward()
        found[name] = [p.grad.clone() for p in trained(model).values() if p.grad is not None]
    torch._dynamo.reset()
    assert found["plain"] and all(
        torch.equal(one, other) for one, other in zip(found["plain"], found["traced"], strict=True)
    )


@pytest.mark.parametrize("together", ["rows", "average", "stack"])
def test_several_float32_adapters_on_a_half_base(tiny, together):
    """By row, averaged and stacked: to the rounding of the outputs what the float32 base gives on the same weights."""
    half = effzoo.build("bert", task="classification", num_labels=3, **tiny).to(torch.bfloat16)
    effzoo.attach(half, "lora|ia3", name="a")
    effzoo.attach(half, "houlsby", name="b")
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    logits = []
    for model in (half, copy.deepcopy(half).float()):
        if together == "rows":
            effzoo.activate(model, rows=["a", None, "b"])
        else:
            effzoo.activate(model, "a", "b", combine=together)
        out = model.eval()(**labelled())
        logits.append(out.logits)
        out.loss.backward()
        assert {p.grad.dtype for p in trained(model).values() if p.grad is not None} == {torch.float32}
    assert logits[0].dtype == torch.bfloat16 and (logits[0].float() - logits[1]).norm() < 0.05 * logits[1].norm()


@pytest.mark.parametrize("method", ["lora", "prefix[length=3]", "prompt[length=2]", "houlsby", "full"])
def test_decoding_with_a_cache_on_a_half_base(tiny, method):
    model = effzoo.attach(effzoo.build("gpt2", task="causal_lm", **tiny).to(torch.bfloat16), method).eval()
    ids = labelled()["input_ids"]
    found = [
        effzoo.generate(model, ids, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert torch.equal(*found)


def test_decoding_takes_a_weight_and_a_bias_of_any_strides():
    """oneDNN reads a bias that is not dense as if it were."""
    draw = torch.Generator().manual_seed(0)
    x, wide = torch.randn(2, 3, 4, generator=draw), torch.randn(12, 8, generator=draw)
    with torch.no_grad(), decoding():
        for weight in (wide[:6, :4], wide[:6, :4].contiguous(), wide[:8].t()[:, :4]):
            for bias in (
                None,
                torch.randn(len(weight), generator=draw),
                torch.randn(2 * len(weight), generator=draw)[::2],
            ):
                exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
                assert (linear(x, weight, bias) - exact).abs().max() < 1e-5
