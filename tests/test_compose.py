"""Several adapters at once: stacked, averaged, another one for each row of the batch; merged and taken out again."""

import copy

import pytest
import torch
from support import small

import effzoo
from effzoo.errors import AdapterError, IncompatibleError, OptionError
from effzoo.peft.attach import adapter_tensors
from effzoo.sites import Conv2d, sites

KINDS = {name: small(name) for name in effzoo.attention.names()} | {
    "full": "full", "longformer": "longformer[window=4]", "blockwise": "blockwise[blocks=2]", "local": "local[chunk=4]",
    "lsh": "lsh[chunk=4]", "linformer": "linformer[k=4]", "perceiver": "perceiver[latents=4]",
}  # fmt: skip
UNION = "lora|bitfit|houlsby[bottleneck=3]|prefix[length=2]|prompt[length=2]"


def build(tiny, attention="full", name="minilm", **more):
    return effzoo.build(name, attention=attention, task="token_classification", **{**tiny, **more}).double().eval()


def drawn(model, *names, spec):
    """Attach the spec under each name with tensors drawn anew, so that the adapters differ."""
    for name in names:
        effzoo.attach(model, spec, name=name)
        with torch.no_grad():
            for tensor in adapter_tensors(model, name).values():
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model


def batch(rows=4, n=9):
    ids = torch.randint(2, 53, (rows, n), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attention", effzoo.attention.names())
@pytest.mark.parametrize("spec", [UNION, "ia3|full[targets=mlp.*]"])
def test_each_row_gets_what_its_adapter_gives_it_alone(tiny, attention, spec):
    model = drawn(build(tiny, KINDS.get(attention, small(attention))), "a", "b", "c", spec=spec)
    rows, inputs = ["b", "a", "b", "c"], batch()
    effzoo.activate(model, rows=rows)
    got = model(**inputs).logits
    got.square().sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = torch.empty_like(got)
    for name in "abc":
        chosen = [i for i, each in enumerate(rows) if each == name]
        out = effzoo.activate(model, name)(**inputs).logits[chosen]
        out.square().sum().backward()
        expected[chosen] = out
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    alone = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == alone.keys() and all(
        torch.allclose(gradients[key], alone[key], rtol=0, atol=1e-9) for key in alone
    )


OTHERS = {
    "a": "lora[rank=3, alpha=12]",
    "b": "lora[rank=3, rslora=true]",
    "c": "lora[rank=2]|houlsby[bottleneck=3]",
    "d": "ia3|norms",
    "e": "dora",
}


@pytest.mark.parametrize("level", ["nothing", "hidden", "blocks"])
@pytest.mark.parametrize(
    ("name", "task"), [("minilm", "token_classification"), ("gpt2", "causal_lm"), ("llama", "causal_lm")]
)
def test_each_row_has_its_own_options_and_methods_whatever_is_recomputed(tiny, name, task, level):
    """Equal shapes with another alpha, other ranks, other methods, and rows without any; one row's order is not the
    order of the adapters."""
    torch.manual_seed(1)
    model = effzoo.build(name, task=task, **tiny, **({"kv_heads": 1} if name == "llama" else {})).double().train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    inputs = batch(7)
    bare = model(**inputs).logits
    for adapter, spec in OTHERS.items():
        drawn(model, adapter, spec=spec)
    rows = ["c", "a", None, "b", "d", "a", "e"]
    alone = {adapter: effzoo.activate(model, adapter)(**inputs).logits for adapter in OTHERS}
    effzoo.activate(model, rows=rows)
    model.recompute = level
    got = model(**inputs).logits
    expected = torch.stack([bare[i] if row is None else alone[row][i] for i, row in enumerate(rows)])
    assert torch.allclose(got, expected, rtol=0, atol=1e-10) and not torch.allclose(alone["a"], alone["b"], atol=1e-3)
    got.square().sum().backward()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(), expected.square().sum().backward()
    wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and key in gradients}
    assert len(gradients) > 20 and wanted.keys() == gradients.keys()
    assert all(torch.allclose(gradients[key], wanted[key], rtol=0, atol=1e-8) for key in gradients)


@pytest.mark.parametrize(
    "spec", ["full", "lora[targets=embed.token]", "bitfit[targets=embed.norm]|full[targets=(embed.token, lm.out)]"]
)
def test_a_tied_head_reads_the_table_of_each_row_and_of_each_averaged_adapter(tiny, spec):
    """One row, or one summand of the mean, is x W_a^T + b_a with the table and the bias of its own adapter."""
    name = "minilm" if "lm.out" in spec else "gpt2"
    model = effzoo.build(name, task="masked_lm" if name == "minilm" else "causal_lm", **tiny).double().eval()
    assert type(model.head.out).__name__ == "TiedLinear"
    bare = model(**batch()).logits
    drawn(model, "a", "b", spec=spec)
    alone = {adapter: effzoo.activate(model, adapter)(**batch()).logits for adapter in "ab"}
    got = effzoo.activate(model, rows=["b", "a", None, "b"])(**batch()).logits
    expected = torch.stack([alone["b"][0], alone["a"][1], bare[2], alone["b"][3]])
    assert torch.allclose(got, expected, rtol=0, atol=1e-10)
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    table, out, outs = model.embeddings.token, model.head.out, []
    for adapter in "ab":
        effzoo.activate(model, adapter)
        outs.append(torch.nn.functional.linear(x, table.composed_weight(), out.composed_bias()))
    effzoo.activate(model, "a", "b", combine="average")
    assert torch.allclose(out(x, table), (outs[0] + outs[1]) / 2, rtol=0, atol=1e-12) and not torch.allclose(
        outs[0], outs[1]
    )


def test_a_row_without_adapter_is_the_bare_base(tiny):
    model = build(tiny)
    bare = model(**batch()).logits
    drawn(model, "a", "b", spec="lora|bitfit|houlsby[bottleneck=3]")
    got = effzoo.activate(model, rows=["a", None, "b", None])(**batch()).logits
    assert torch.allclose(got[[1, 3]], bare[[1, 3]], rtol=0, atol=1e-12) and not torch.allclose(got[0], bare[0])


@pytest.mark.parametrize(
    ("specs", "rows", "problem"),
    [
        (("prompt[length=2]", "prompt[length=3]"), ["a", "b", "a", "b"], "equal numbers of prompt tokens"),
        (("routed", "lora"), ["a", "b", "a", "b"], "a mixture routes by itself"),
        (("prefix", "prefix"), ["a", "b"], "as many choices as the batch has rows"),
        (("lora", "lora"), ["a", "b"], "as many choices as the batch has rows"),
        (("prompt", "prompt"), ["a", "b", None, "a"], "a row without adapter"),
    ],
)
def test_rows_that_cannot_be_served_are_refused(tiny, specs, rows, problem):
    model = build(tiny)
    for name, spec in zip("ab", specs, strict=True):
        effzoo.attach(model, spec, name=name)
    with pytest.raises(IncompatibleError, match=problem):
        effzoo.activate(model, rows=rows)(**batch())


def test_the_choice_by_row_ends_with_the_next_activation(tiny):
    model = drawn(build(tiny), "a", "b", spec="lora")
    alone = effzoo.activate(model, "a")(**batch()).logits
    effzoo.activate(model, rows=["a", "b", "b", "a"])
    assert torch.equal(effzoo.activate(model, "a")(**batch()).logits, alone)


def test_averaging_is_the_mean_of_what_each_adapter_makes_of_every_site(tiny):
    """For LoRA at one site that is LoRA with the mean of the changes; a prefix is the mean prefix."""
    model = drawn(build(tiny, layers=1), "a", "b", spec="lora[targets=attn.q]|prefix[length=2]")
    got = effzoo.activate(model, "a", "b", combine="average")(**batch()).logits
    twin = effzoo.attach(build(tiny, layers=1), "prefix[length=2]", name="a")
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k in twin.state_dict()})
    found = dict(sites(model))
    with torch.no_grad():
        loras = [found["blocks.0.attn.q"].of(name)["lora"] for name in "ab"]
        dict(sites(twin))["blocks.0.attn.q"].weight += sum(lora.scale * lora.B @ lora.A for lora in loras) / 2
        for path in [path for path, site in found.items() if "a" in site.adapters and path != "blocks.0.attn.q"]:
            for method in found[path].of("a"):
                pairs = zip(dict(sites(twin))[path].of("a")[method].parameters(),
                            found[path].of("a")[method].parameters(),
                            found[path].of("b")[method].parameters(), strict=True)  # fmt: skip
                for mine, one, other in pairs:
                    mine.copy_((one + other) / 2)
    assert torch.allclose(got, twin(**batch()).logits, rtol=0, atol=1e-12)


def test_an_average_of_one_adapter_with_itself_is_that_adapter(tiny):
    model = drawn(build(tiny), "a", spec=UNION)
    effzoo.attach(model, UNION, name="b")
    with torch.no_grad():
        for mine, theirs in zip(
            adapter_tensors(model, "b").values(), adapter_tensors(model, "a").values(), strict=True
        ):
            mine.copy_(theirs)
    alone = effzoo.activate(model, "a")(**batch()).logits
    both = effzoo.activate(model, "a", "b", combine="average")(**batch()).logits
    assert torch.allclose(both, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_unmerging_restores_every_bit(tiny, dtype):
    model = drawn(build(tiny).to(dtype), "a", spec="lora|bitfit|ia3")
    twin = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    effzoo.merge(model, "a")
    assert not effzoo.attached(model) and not all(
        torch.equal(before[key], value) for key, value in model.state_dict().items()
    )
    effzoo.unmerge(model, "a")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(model(**batch()).logits, twin(**batch()).logits)
    flags = {key: p.requires_grad for key, p in twin.named_parameters()}
    assert flags == {key: p.requires_grad for key, p in model.named_parameters()}


def test_merged_adapters_come_out_in_the_reverse_order(tiny):
    model = drawn(build(tiny), "a", "b", spec="lora")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    effzoo.merge(model, "a")
    effzoo.merge(model, "b")
    with pytest.raises(AdapterError, match="'b' was merged after 'a'"):
        effzoo.unmerge(model, "a")
    effzoo.unmerge(model, "b")
    effzoo.unmerge(model, "a")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(AdapterError, match="no merged adapter 'a'"):
        effzoo.unmerge(model, "a")


def test_merging_for_good_keeps_nothing(tiny):
    model = drawn(build(tiny), "a", spec="lora")
    effzoo.merge(model, "a", undo=False)
    with pytest.raises(AdapterError, match="merged with undo"):
        effzoo.unmerge(model, "a")


def test_the_report_says_how_much_of_a_change_a_dtype_loses(tiny):
    """In bfloat16 a change far below the weight's spacing is lost completely; in float64 the error is rounding
    noise."""
    model = effzoo.attach(build(tiny), "lora[targets=attn.q]", name="a")
    with torch.no_grad():
        for site in (site for _, site in sites(model) if site.role == "attn.q"):
            site.weight.copy_(torch.where(site.weight < 0, -1.0, 1.0))
            site.of("a")["lora"].A.fill_(1e-2)
            # a change of 8e-4 everywhere; the spacing of bfloat16 at 1 is 7.8e-3 above and 3.9e-3 below
            site.of("a")["lora"].B.fill_(1e-2)
    half = copy.deepcopy(model).to(torch.bfloat16)
    exact, rounded = (effzoo.merge(each, "a", report=True) for each in (model, half))
    rows = {row.tensor: row for row in rounded.tensors if ".attn.q." in row.tensor and row.delta}
    assert set(rows) == {f"blocks.{i}.attn.q.weight" for i in range(2)}
    assert all(row.lost == 1 and row.relative == pytest.approx(1) for row in rows.values())
    assert exact.worst < 1e-12 and "attn.q" in str(rounded)
    row = rows["blocks.0.attn.q.weight"]
    assert row.delta == pytest.approx(8 * 1e-4 * 16, rel=0.02)  # the Frobenius norm of 16 x 16 entries


@pytest.mark.parametrize("spec", ["lora[rank=3, alpha=7]", "ia3", "bitfit", "full"])
def test_the_delta_is_what_the_attached_model_computes_with(tiny, spec):
    model = drawn(build(tiny), "a", spec=spec)
    expected, changes = model(**batch()).logits, effzoo.peft.delta(model, "a")
    effzoo.detach(model, "a")
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        for key, change in changes.items():
            tensors[key].add_(change)
    assert torch.allclose(model(**batch()).logits, expected, rtol=0, atol=1e-12)


def test_the_numerical_rank_is_within_the_declared_one(tiny):
    model = drawn(build(tiny), "a", spec="lora[rank=3]")
    account, ranks = effzoo.account(model), effzoo.peft.ranks(model, "a")
    of_network = {key: rank for key, rank in ranks.items() if not key.startswith("head")}
    assert account.rank == 3 and set(of_network.values()) == {3} and len(of_network) == 4


def test_shared_tensors_are_trained_stored_and_counted_once(tiny):
    """A method may register one parameter in the modules of several sites."""
    from effzoo.peft import Method, PeftModule, register
    from effzoo.sites import Linear

    class Shift(PeftModule):
        def __init__(self, shared):
            super().__init__()
            self.shift = shared

        def after(self, x, y, context):
            return y + self.shift

    with effzoo.scope():

        @register("shared_shift")
        class SharedShift(Method):
            """y' = y + s with one s for all sites."""

            accepts, default_targets = (Linear,), ("attn.q", "attn.k")

            def __init__(self, *, start: float = 0.0):
                super().__init__()
                self.start = start

            def prepare(self, model, found):
                self.shared = torch.nn.Parameter(torch.full((next(iter(found.values())).out_features,), self.start))

            def make(self, site):
                return Shift(self.shared)

        model = build(tiny)
        effzoo.attach(model, "shared_shift[start=0.5]", name="a")
        account, head = effzoo.account(model), sum(p.numel() for p in model.head.parameters()) // 2
        assert account.trainable == account.stored == 16 + head
        model(**batch()).logits.square().sum().backward()
        shifts = [site.of("a")["shared_shift"].shift for _, site in sites(model) if site.role in ("attn.q", "attn.k")]
        assert len(shifts) == 4 and all(shift is shifts[0] for shift in shifts) and shifts[0].grad.abs().sum() > 0
        twin = copy.deepcopy(model)
        shifts = [site.of("a")["shared_shift"].shift for _, site in sites(twin) if site.role in ("attn.q", "attn.k")]
        assert all(shift is shifts[0] for shift in shifts)


def test_a_convolution_is_a_site(tiny):
    conv = Conv2d(3, 5, 3, padding=1, role="conv").double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    assert torch.equal(conv(x), plain)
    effzoo.attach(conv, "full", name="a")
    with torch.no_grad():
        conv.of("a")["full"].own_weight.mul_(2)
    assert torch.allclose(conv(x), 2 * (plain - conv.bias[:, None, None]) + conv.bias[:, None, None], atol=1e-12)


def test_activation_says_what_it_accepts(tiny):
    model = effzoo.attach(build(tiny), "lora", name="a")
    with pytest.raises(AdapterError, match="either adapter names or rows"):
        effzoo.activate(model, "a", rows=["a"])
    with pytest.raises(OptionError, match="combine is 'stack' or 'average', got 'sum'"):
        effzoo.activate(model, "a", combine="sum")
