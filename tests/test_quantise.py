"""A quantised base: error bounds, products and gradients as with the dense weight of the codes, what stays frozen, what
is saved and refused."""

import copy

import pytest
import torch
from support import finetune, labelled, small

import effzoo
from effzoo import nf4
from effzoo.codes import coded, decoded
from effzoo.errors import AdapterError, ConversionError, IncompatibleError, OptionError, TargetError
from effzoo.quantisation import QuantisedLinear
from effzoo.quantisation.model import size
from effzoo.quantisation.view import Decoded
from effzoo.sites import Linear, sites

METHODS = [
    "lora[rank=2]",
    "houlsby[bottleneck=3]",
    "ia3",
    "prefix[length=2]",
    "dora[rank=2]",
    "bitfit",
    "full",
    "diff",
    "said",
    "krona",
]


@pytest.fixture
def build(tiny):
    def made(name="bert", **options):
        torch.manual_seed(0)
        return effzoo.build(name, **{**tiny, "task": "classification", "num_labels": 3, **options})

    return made


def quantised(model):
    return {path: site for path, site in sites(model) if isinstance(site, QuantisedLinear)}


def dense_twin(model):
    """A copy whose quantised weights are dense, with the numbers of the codes."""
    twin = copy.deepcopy(model)
    effzoo.dequantise(twin)
    return twin


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 13), (1, 200), (64, 64)])
def test_eight_bits_are_at_most_half_a_step_of_their_row_away(shape, dtype):
    weight = (torch.randn(shape) * torch.logspace(-3, 2, shape[0])[:, None]).to(dtype)
    weight[0] = 0
    codes, scales = coded(weight, 8)
    assert codes.dtype == torch.int8 and codes.shape == shape and scales.shape == shape[:1] and scales.dtype == dtype
    exact = codes.double() * scales.double()[:, None]
    # where w / s itself is rounded, in steps
    slack = 1e-12 if dtype == torch.float64 else 2e-6 if dtype == torch.float32 else 0.3
    assert ((weight.double() - exact).abs() <= scales.double()[:, None] * (0.5 + slack)).all()
    assert (decoded(codes, scales, weight.shape, 8)[0] == 0).all() and torch.isfinite(
        decoded(codes, scales, weight.shape, 8)
    ).all()
    assert (
        not codes.eq(-128).any()
        and (scales.double() * 127 / weight.double().abs().amax(1).clamp(min=1e-300))[1:].sub(1).abs().lt(1e-2).all()
    )


@pytest.mark.parametrize("shape", [(7, 13), (1, 200), (64, 64), (3, 1)])
def test_four_bits_are_the_nearest_of_sixteen_levels_times_the_scale_of_the_block(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    codes, scales = coded(weight, 4)
    found = decoded(codes, scales, weight.shape, 4)
    levels, flat = nf4.levels(), weight.flatten().tolist()
    for at, (before, after) in enumerate(zip(flat, found.flatten().tolist(), strict=True)):
        block = flat[at // 64 * 64 : at // 64 * 64 + 64]
        values = levels * max(map(abs, block))
        assert min(abs(values - before)) == pytest.approx(abs(after - before), abs=1e-12)
    assert len(codes) == -(-weight.numel() // 64) * 32 and len(scales) == -(-weight.numel() // 64)
    assert torch.equal(found, nf4.decode(codes, scales, weight.shape))
    assert (decoded(*coded(torch.zeros(2, 3), 4), torch.Size((2, 3)), 4) == 0).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_decoded_weight(bits, bias):
    plain = Linear(13, 5, bias=bias, role="attn.q").double()
    site = QuantisedLinear.made_of(copy.deepcopy(plain), bits)
    twin = copy.deepcopy(site).dense()
    assert type(twin) is Linear and not twin.weight.requires_grad and "codes" not in twin.state_dict()
    x, y = (torch.randn(2, 3, 13, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch.no_grad():
        y.copy_(x)
    one, other, seed = site(x), twin(y), torch.randn(2, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
    one.backward(seed)
    other.backward(seed)
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-14)
    if bias:
        torch.testing.assert_close(site.bias.grad, twin.bias.grad, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(site, (x.detach().requires_grad_(),))


def test_nothing_of_the_weight_or_of_the_input_is_kept_for_the_backward_pass():
    site, kept = QuantisedLinear.made_of(Linear(64, 48, role="attn.q"), 8), []
    site.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        site(torch.randn(5, 64, requires_grad=True))
    assert {id(tensor) for tensor in kept} <= {id(site.codes), id(site.scales)}
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 64 * 48 + 4 * 48


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("peft", METHODS)
def test_adapters_learn_as_on_the_dense_base_of_the_same_numbers(build, peft, bits):
    model = build().double()
    effzoo.quantise(model, bits)
    twin = dense_twin(model)
    batch, gradients = labelled(), []
    for subject in (model, twin):
        torch.manual_seed(1)
        effzoo.attach(subject, peft)
        effzoo.peft.calibrate(subject, [batch])
        for stage, _ in effzoo.peft.timetable(subject, 2)[:1]:
            effzoo.peft.begin(subject, stage)
        torch.manual_seed(2)
        effzoo.peft.loss(subject.train(), **batch).backward()
        gradients.append({name: p.grad for name, p in subject.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        if gradient is None or gradients[1][name] is None:
            assert gradient is gradients[1][name], name
        else:
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", effzoo.attention.names())
def test_every_attention_works_on_a_quantised_base(build, kind):
    model = build(attention=small(kind))
    effzoo.quantise(model, 4)
    effzoo.attach(model, "lora[rank=2]")
    twin, batch = dense_twin(model), labelled()
    with torch.no_grad():
        for subject in (model, twin):
            torch.manual_seed(3)
            for parameter in subject.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    losses = []
    for subject in (model, twin):
        loss = subject.train()(**batch).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for (name, one), (_, other) in zip(model.named_parameters(), twin.named_parameters(), strict=False):
        if one.requires_grad and ".adapters." in name:
            other = dict(twin.named_parameters())[name]
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-6)


def test_codes_keep_their_bits_in_training_and_adapters_come_back_on_the_same_base_alone(build, tmp_path):
    data = [{"input_ids": [3 + i, 4, 5 + i], "label": i % 3} for i in range(8)]
    model = build(peft=None)
    effzoo.quantise(model, 8)
    effzoo.attach(model, "lora[rank=2]")
    before = {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}
    result = finetune(
        model, data, output_dir=tmp_path, max_steps=4, learning_rate=1e-2, weight_decay=0.5, save_every=2,
        recompute="blocks", progress=False,
    )  # fmt: skip
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items()) and any(
        "codes" in key for key in before
    )
    same = build()
    effzoo.quantise(same, 8)
    effzoo.load_adapter(same, result.adapter)
    batch = labelled()
    assert torch.equal(same.eval()(**batch).logits, model.eval()(**batch).logits)
    other = build()
    effzoo.quantise(other, 4)
    for wrong in (build(), other, dense_twin(build())):
        with pytest.raises(AdapterError, match="trained on another base"):
            effzoo.load_adapter(wrong, result.adapter)
    resumed = finetune(
        same,
        data,
        output_dir=tmp_path,
        max_steps=4,
        learning_rate=1e-2,
        weight_decay=0.5,
        save_every=2,
        resume=True,
        progress=False,
    )
    assert resumed.history == result.history


@pytest.mark.parametrize("reversible", [False, True])
def test_recomputing_changes_no_bit(build, reversible):
    options = {"residual": "reversible", "norm": "pre"} if reversible else {}
    model, gradients = build(dropout=0.2, **options), []
    effzoo.quantise(model, 4)
    effzoo.attach(model, "lora")
    for level in ("nothing", "hidden", "blocks"):
        model.zero_grad()
        model.recompute = level
        torch.manual_seed(5)
        model.train()(**labelled()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(
        torch.equal(one, other) for again in gradients[1:] for one, other in zip(gradients[0], again, strict=True)
    )


def test_bytes_are_a_quarter_and_an_eighth_of_the_matrices_and_the_scales(build):
    for bits, per_entry in ((8, 1), (4, 0.5)):
        model = build(dim=64, heads=2, mlp=128)
        entries = sum(
            site.weight.numel() for _, site in sites(model) if isinstance(site, Linear) and site.layer is not None
        )
        rows = sum(site.out_features for _, site in sites(model) if isinstance(site, Linear) and site.layer is not None)
        before = size(model)
        found = effzoo.quantise(model, bits)
        scales = 4 * rows if bits == 8 else 4 * entries // 64
        assert (found.dense, found.codes, found.matrices) == (4 * entries, per_entry * entries + scales, 12)
        assert size(model) == found.after == before - found.dense + found.codes == effzoo_bytes(model)
        assert str(found).startswith(f"12 matrices in {bits} bits") and 0 < found.error < (0.01 if bits == 8 else 0.11)
        assert (
            effzoo.plan(model, "lora", batch=1, length=8).weights
            < effzoo.plan(build(dim=64, heads=2, mlp=128), "lora", batch=1, length=8).weights
        )


def effzoo_bytes(model):
    return sum(value.numel() * value.element_size() for value in model.state_dict().values()) + sum(
        buffer.numel() * buffer.element_size()
        for name, buffer in model.named_buffers()
        if name not in model.state_dict()
    )


def test_outputs_stay_near_those_of_the_whole_weights(build):
    model, batch = build(dim=64, heads=2, mlp=128).eval(), labelled()
    exact = model(**batch).logits
    errors = []
    for bits in (8, 4):
        subject = copy.deepcopy(model)
        effzoo.quantise(subject, bits)
        errors.append(((subject(**batch).logits - exact).norm() / exact.norm()).item())
    assert 0 < errors[0] < 0.02 and errors[0] < errors[1] < 0.3


def test_dequantising_keeps_the_outputs_and_then_merging_works(build):
    model, batch = build().eval(), labelled()
    effzoo.quantise(model, 4)
    effzoo.attach(model, "lora[rank=2]")
    with torch.no_grad():
        [p.add_(0.1) for p in model.parameters() if p.requires_grad]
    before, state = model(**batch).logits, {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"quantised.*dequantise"):
        effzoo.merge(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items()), (
        "nothing was written anywhere"
    )
    assert effzoo.dequantise(model) == 12 and not quantised(model)
    torch.testing.assert_close(model(**batch).logits, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(effzoo.merge(model)(**batch).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "peft", ["dora[rank=2, targets=(attn.q, mlp.up)]", "bitfit", "full", "diff", "lora[targets=(attn.q, mlp.down)]"]
)
def test_merging_is_refused_at_every_door_before_anything_is_written(build, peft):
    model = build()
    effzoo.quantise(model, 8, targets="mlp.*")
    effzoo.attach(model, peft)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match="quantised"):
        effzoo.merge(model)
    assert all(
        torch.equal(state[key], value)
        for key, value in model.state_dict().items()
        if key in state and ".adapters." not in key
    )


def test_adapters_by_row_average_and_account_for_the_base_as_ever(build):
    model, batch = build().eval(), labelled()
    effzoo.quantise(model, 8)
    for name in ("a", "b"):
        effzoo.attach(model, "lora[rank=2]", name=name)
    with torch.no_grad():
        [p.add_(0.1 * torch.randn_like(p)) for name, p in model.named_parameters() if ".adapters." in name]
    alone = []
    for name in ("a", "b", "a"):
        effzoo.activate(model, name)
        alone.append(model(**batch).logits)
    effzoo.activate(model, rows=["a", "b", "a"])
    mixed = model(**batch).logits
    for row in range(3):
        torch.testing.assert_close(mixed[row], alone[row][row], rtol=1e-4, atol=1e-5)


def test_precisions_and_casts(build):
    model = build(peft="lora[rank=2]")
    effzoo.quantise(model, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.train()(**labelled()).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    exact = model.eval()(**labelled()).logits
    half = model.to(torch.bfloat16)
    assert next(iter(quantised(half).values())).codes.dtype == torch.int8
    torch.testing.assert_close(half(**labelled()).logits.float(), exact, rtol=0.05, atol=0.05)  # 8 bits of mantissa


def test_the_weight_is_one_object_that_can_be_read_and_not_written():
    plain = Linear(6, 4, role="attn.q")
    site = QuantisedLinear.made_of(copy.deepcopy(plain), 8)
    assert (
        site.weight is site.weight is site.base()["weight"]
        and isinstance(site.weight, Decoded)
        and not isinstance(site.weight, torch.nn.Parameter)
    )
    assert type(site.weight + 1) is torch.Tensor and torch.equal(site.weight.detach().clone(), site.numbers())
    assert copy.deepcopy(site).weight is not site.weight
    with pytest.raises(AdapterError, match="quantised"):
        site.weight.copy_(plain.weight)
    with pytest.raises(AdapterError, match="quantised"):
        site.weight.fill_(0)
    assert "0." in repr(site.weight)


def test_what_cannot_be_is_refused_with_the_reason(build):
    model = build()
    with pytest.raises(OptionError, match="bits is 8"):
        effzoo.quantise(model, 3)
    with pytest.raises(TargetError, match="target 'attn.qq' matches no linear site; did you mean 'attn.q'"):
        effzoo.quantise(model, targets=("attn.qq",))
    found = effzoo.quantise(model, targets=["attn.q", "attn.v"])
    assert found.matrices == 4 and {site.role for site in quantised(model).values()} == {"attn.q", "attn.v"}
    assert effzoo.quantise(model, 4).matrices == 8, "what is quantised already stays as it is"
    with pytest.raises(IncompatibleError, match="is quantised already"):
        effzoo.quantise(model, 4)
    with pytest.raises(IncompatibleError, match="swap first"):
        effzoo.swap_attention(model, "longformer[window=4]")
    with pytest.raises(ConversionError, match="dequantise"):
        effzoo.convert.to_transformers(model)
    effzoo.attach(model, "fish[keep=0.1]")
    with pytest.raises(AdapterError, match="needs a dense base"):
        effzoo.peft.calibrate(model, [labelled()])


def test_a_perceiver_and_a_decoder_that_decodes_are_quantised_too(build):
    decoder = build("gpt2", task="causal_lm", pad_token=0).eval()
    effzoo.quantise(decoder, 8)
    ids = torch.tensor([[5, 6, 7]])
    assert effzoo.generate(decoder, ids, max_new_tokens=4).shape == (1, 7)
    perceiver = build(
        "perceiver-io", channels=16, latents=6, cross_heads=2, cross_mlp=16, decoder_heads=2, decoder_mlp=16
    )
    assert effzoo.quantise(perceiver, 8).matrices > 0
    assert torch.isfinite(perceiver.eval()(input_ids=ids).logits).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_account_counts_the_numbers_that_codes_stand_for(tiny, bits):
    dense, coded = (effzoo.build("bert", task="classification", peft="lora[rank=2]", **tiny) for _ in range(2))
    effzoo.quantise(coded, bits)
    assert effzoo.account(coded).total == effzoo.account(dense).total
