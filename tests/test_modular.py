"""Routed and fused adapters: against their sums written out in float64, and the laws of what one expert is."""

import copy

import pytest
import torch
from torch.nn import functional as F

import effzoo
from effzoo.attention.core import Cache
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.matrix import cell
from effzoo.checks.peft import Subject as Tuned
from effzoo.errors import AdapterError, IncompatibleError, IncompatiblePeft, InputError, OptionError, UnknownNameError
from effzoo.peft import extract, gather
from effzoo.peft.training import penalty
from effzoo.sites import calling, sites
from effzoo.sites.hooks import at_hand
from effzoo.train import finetune
from tests.support import labelled
from tests.test_aggregation import moved

EXACT = {"rtol": 1e-10, "atol": 1e-12}
ONE = "lora[rank=2]"
MIXTURES = ("routed", "fusion")
# their experts do the same for some steps at some site, so there the router's gradient is 0
EQUAL_AT_FIRST = ("fish", "head_pruning")
BEFORE_ALL_TOKENS = ("ipt", "ladder", "p_tuning", "prompt")


def built(tiny, spec, task="classification", name="default", kind="bert", **options):
    torch.manual_seed(0)
    model = effzoo.build(kind, task=task, num_labels=3, **{**tiny, **options}).double().eval()
    effzoo.attach(model, spec, name=name)
    moved(model, name, 1)
    return model


def mixtures(model, name="default"):
    """The mixtures of an adapter with their sites, by path."""
    hung = {path: (site, site.of(name)) for path, site in sites(model) if name in site.adapters}
    return {path: (site, next(iter(own.values()))) for path, (site, own) in hung.items() if {*own} & {*MIXTURES}}


def inputs_of(model, path, batch):
    """What a site gets and gives in a forward pass, and the context that its hooks are given."""
    seen, site = [], dict(sites(model))[path]

    def see(_, x, y):
        seen.append((*x, y, at_hand()))

    hook = site.register_forward_hook(see)
    model(**batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    "router",
    [
        "soft",
        "uniform",
        "top_k[k=1]",
        "top_k[k=2]",
        "switch",
        "gumbel",
        "gumbel[form=sigmoid]",
        "base",
        "expert_choice",
    ],
)
def test_a_site_gives_the_weighted_sum_of_what_its_experts_add(tiny, router):
    model, batch = built(tiny, f"routed[of='{ONE}', experts=3, router='{router}']"), labelled()
    path, (site, module) = next(iter(mixtures(model).items()))
    x, y, _ = inputs_of(model, path, batch)
    valid = batch["attention_mask"].bool()
    weights = torch.zeros(*valid.shape, 3, dtype=torch.float64)
    weights[valid] = module.router(x[valid]).weights.double()  # padding is not routed
    expected = F.linear(x, site.weight, site.bias)
    for i, expert in enumerate(module.experts):
        expected = expected + weights[..., i : i + 1] * (x @ expert["lora"].A.T @ expert["lora"].B.T)
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize(
    "method",
    ["lora[rank=2]", "ia3", "dora[rank=2]", "houlsby[bottleneck=3]", "krona", "bitfit", "full[targets=mlp.up]"],
)
def test_experts_of_any_door_are_mixed_alike(tiny, method):
    model = effzoo.attach(
        effzoo.build("bert", task="classification", num_labels=3, **tiny).double().eval(),
        f"routed[of='{method}', experts=2]",
    )
    moved(model, "default", 3)
    batch = labelled()
    for path, (site, module) in mixtures(model).items():
        *x, y, context = inputs_of(model, path, batch)
        with torch.no_grad(), calling(context):
            plain = site.compute((), *x)
            weights = module.weights(plain if path.endswith(("token", "position")) else x[0], context)
            expected = plain + sum(
                w * (site.compute(tuple(own), *x) - plain)
                for w, own in zip(weights, module.expert_modules(), strict=True)
            )
        torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(effzoo.peft.names()) - {*MIXTURES, *EQUAL_AT_FIRST, "residual_adapter"}))
def test_any_method_is_an_expert(method):
    found = cell(Tuned.of(f"routed[of='{method}', experts=2]"), Kind.of("full"), "encoder")
    assert found.status == ("refused" if method in BEFORE_ALL_TOKENS else "works"), found.reason
    if found.status == "refused":
        assert "before, or on, all tokens" in found.reason


@pytest.mark.parametrize("level", ["token", "example"])
@pytest.mark.parametrize("method", [ONE, "prefix[length=3, init=normal]", "llama_adapter", "houlsby[bottleneck=3]"])
def test_padding_changes_nothing(tiny, method, level):
    model = built(tiny, f"routed[of='{method}', experts=2, level={level}]")
    batch = labelled()
    row = {"input_ids": batch["input_ids"][1:2, :5], "attention_mask": batch["attention_mask"][1:2, :5]}
    torch.testing.assert_close(
        model(**row).logits, model(batch["input_ids"], batch["attention_mask"]).logits[1:2], **EXACT
    )


def test_by_example_the_router_reads_the_mean_of_the_tokens(tiny):
    model, batch = built(tiny, f"routed[of='{ONE}', experts=3, level=example]"), labelled()
    path, (_, module) = next(iter(mixtures(model).items()))
    x, _, context = inputs_of(model, path, batch)
    mean = torch.stack([row[keep.bool()].mean(dim=0) for row, keep in zip(x, batch["attention_mask"], strict=True)])
    weights = module.weights(x, context)
    torch.testing.assert_close(weights, module.router(mean).weights.double().T.reshape(3, 3, 1, 1), **EXACT)


@pytest.mark.parametrize(
    "method",
    [
        ONE,
        "ia3",
        "bitfit",
        "pfeiffer[bottleneck=3]",
        "prefix[length=3, init=normal]",
        "adamix[bottleneck=3]",
        "lora[rank=2]|ia3",
    ],
)
def test_fixed_routing_is_each_adapter_alone(tiny, method):
    torch.manual_seed(0)
    model, batch = effzoo.build("bert", task="classification", num_labels=3, **tiny).double().eval(), labelled()
    for seed, name in enumerate("ab"):
        effzoo.attach(model, method, name=name)
        moved(model, name, seed)
    alone = {}
    effzoo.peft.finish(model, "a", "b")
    gather(model, ["a", "b"], name="m", how="routed[router=fixed]", head="a")
    head = model.head.out.of("m")["head"].state_dict()
    for name in "ab":
        effzoo.activate(model, name)
        alone[name] = model(**batch).last_hidden_state
    torch.testing.assert_close(head, model.head.out.of("a")["head"].state_dict(), rtol=0, atol=0)
    effzoo.activate(model, "m")
    out = model(**batch, task_ids=torch.tensor([0, 1, 0])).last_hidden_state
    expected = torch.stack([alone["a"][0], alone["b"][1], alone["a"][2]])
    torch.testing.assert_close(out[batch["attention_mask"].bool()], expected[batch["attention_mask"].bool()], **EXACT)


@pytest.mark.parametrize("how", ["fusion", "routed", "routed[router='top_k[k=1]']"])
@pytest.mark.parametrize("method", [ONE, "pfeiffer[bottleneck=3]", "ia3"])
def test_a_mixture_of_one_adapter_is_the_adapter(tiny, how, method):
    model, batch = built(tiny, method, task="features", name="a"), labelled()
    del batch["labels"]
    real = batch["attention_mask"].bool()  # padding is not routed
    expected = model(**batch).last_hidden_state[real]
    gather(model, ["a"], name="m", how=how)
    torch.testing.assert_close(model(**batch).last_hidden_state[real], expected, **EXACT)


def test_an_expert_taken_out_is_what_was_put_in(tiny):
    model, batch = built(tiny, ONE, name="a"), labelled()
    expected = model(**batch).logits
    effzoo.attach(model, "ia3", name="b")
    gather(model, ["a", "b"], name="m", how="routed", head="a")
    extract(model, "m", 0, name="again")
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "method",
    ["diff[targets=attn.q]", "lt_sft[targets=attn.q]", "magnitude[targets=attn.q]", "supermask[targets=attn.q]"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_an_adapter_that_chose_entries_is_gathered_and_extracted_as_it_is(tiny, method, finished):
    model = effzoo.attach(
        effzoo.attach(effzoo.build("bert", **tiny).eval(), method, name="a"), "lora[rank=2]", name="b"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    if finished:
        effzoo.peft.finish(model, "a")
    x = torch.randint(2, 53, (2, 7))
    effzoo.peft.gather(model, ["a", "b"], name="both", how="routed")
    effzoo.peft.extract(model, "both", 0, name="again")
    again = model(x).last_hidden_state
    expected = effzoo.activate(model, "a")(x).last_hidden_state
    assert torch.equal(again, expected) and not torch.equal(expected, effzoo.activate(model)(x).last_hidden_state)


def test_gathered_experts_are_stored_and_loaded(tiny, tmp_path):
    spec = "adamix[bottleneck=3]|prefix[length=3, form=mlp, hidden=4]"
    model, batch = built(tiny, spec, name="a"), labelled()
    effzoo.attach(model, spec, name="b")
    moved(model, "b", 2)
    gather(model, ["a", "b"], name="m", how="routed[level=example]")
    moved(model, "m", 4)
    effzoo.save_adapter(model, tmp_path, name="m")
    expected = model(**batch).logits
    torch.manual_seed(0)
    other = effzoo.load_adapter(
        effzoo.build("bert", task="classification", num_labels=3, **tiny).double().eval(), tmp_path
    )
    torch.testing.assert_close(other(**batch).logits, expected, rtol=0, atol=0)


def test_experts_stack_on_a_fixed_adapter(tiny):
    """A hybrid: the language's adapter acts on every token, the task's experts are learned."""
    model, batch = built(tiny, "houlsby[bottleneck=3]", name="language"), labelled()
    effzoo.attach(model, "routed[of='pfeiffer[bottleneck=3]', experts=2]", name="task")
    moved(model, "task", 5)
    effzoo.activate(model, "language", "task")
    path = "blocks.0.mlp_branch"
    x, y, out, context = inputs_of(model, path, batch)
    site = dict(sites(model))[path]
    before, module = site.of("language")["houlsby"].after(x, y, context), site.of("task")["routed"]
    expected = before
    for weight, own in zip(module.weights(x, context), module.expert_modules(), strict=True):
        expected = expected + weight * (own[0].after(x, before, context) - before)
    torch.testing.assert_close(out, expected, **EXACT)


def test_fusion_is_attention_over_what_adapters_add(tiny):
    model, batch = built(tiny, "fusion[of='pfeiffer[bottleneck=3]', experts=3]"), labelled()
    path, (_, module) = next(iter(mixtures(model).items()))
    x, y, out, context = inputs_of(model, path, batch)
    expected = torch.empty_like(out)
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            added = [own[0].after(x[b, t], y[b, t], context) - y[b, t] for own in module.expert_modules()]
            scores = torch.stack([(module.query @ y[b, t]) @ (module.key @ a) for a in added]).softmax(dim=0)
            expected[b, t] = y[b, t] + sum(s * (module.value @ a) for s, a in zip(scores, added, strict=True))
    torch.testing.assert_close(out, expected, **EXACT)


def test_fusion_leaves_its_adapters_as_they_are_and_keeps_values_near_the_identity(tiny):
    model, batch = built(tiny, "fusion[of='pfeiffer[bottleneck=3]', experts=2]").train(), labelled()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    matrices = [m.value - torch.eye(len(m.value)) for _, m in mixtures(model).values()]
    torch.testing.assert_close(penalty(model), 0.01 * sum(m.square().sum() for m in matrices), **EXACT)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        effzoo.peft.loss(model, **batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed and all(".fusion." in key or ".head." in key for key in changed)
    assert not [key for key in changed if ".experts." in key]


def test_the_losses_of_routers_are_a_penalty(tiny):
    model, batch = built(tiny, f"routed[of='{ONE}', experts=3, router='switch[balance=0.1]']").train(), labelled()
    assert penalty(model) is None
    model(**batch)
    each = [m.pending.loss for _, m in mixtures(model).values()]
    losses = []
    with torch.no_grad():
        for path, (_, module) in mixtures(model).items():
            x = inputs_of(copy.deepcopy(model), path, batch)[0][batch["attention_mask"].bool()]
            losses.append(module.router(x).loss)
    torch.testing.assert_close(torch.stack(each).sum(), torch.stack(losses).mean(), **EXACT)
    torch.testing.assert_close(penalty(model), torch.stack(each).sum(), **EXACT)
    assert penalty(model) is None  # once per pass
    supervised = model(**batch).loss
    model.zero_grad()
    torch.testing.assert_close(effzoo.peft.loss(model, **batch), supervised + torch.stack(losses).mean(), **EXACT)


def test_gradients_are_the_same_under_checkpointing(tiny):
    found = []
    for checkpointing in (False, True):
        model = built(
            tiny, f"routed[of='{ONE}', experts=3, router='switch[balance=0.1, capacity=0.7]', level=token]"
        ).train()
        model.recompute = "blocks" if checkpointing else "nothing"
        effzoo.peft.loss(model, **labelled()).backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, **EXACT)


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_one_router_for_the_model_makes_one_choice(tiny, residual):
    spec = f"routed[of='{ONE}', experts=3, router=gumbel, level=example, scope=model]"
    model = built(tiny, spec, residual=residual, norm="pre").train()
    assert len({id(m.router) for _, m in mixtures(model).values()}) == 1
    with effzoo.routing.watch(model) as watched:
        model(**labelled()).loss.backward()
    assert len({usage.share for usage in watched.passes}) == 1
    assert all(p.grad is not None for m in [next(iter(mixtures(model).values()))[1]] for p in m.router.parameters())


def test_finetune_reads_the_tasks_and_learns_which_skills_they_use(tiny, tmp_path):
    torch.manual_seed(0)
    model = effzoo.build("bert", task="classification", num_labels=3, **tiny)
    effzoo.attach(model, f"routed[of='{ONE}', experts=2, router='skills[tasks=3]']")
    rows = [
        {"input_ids": [2 + i % 5, 7, 9 + i % 3][: 2 + i % 2], "labels": i % 3, "task_ids": i % 3} for i in range(24)
    ]
    before = next(iter(mixtures(model).values()))[1].router.table.detach().clone()
    result = finetune(model, rows, evaluate=rows, output_dir=tmp_path, max_steps=6, batch_size=4, progress=False)
    assert result.steps == 6 and result.metrics["eval_loss"] > 0
    assert not torch.equal(next(iter(mixtures(model).values()))[1].router.table, before)


def test_all_tokens_of_a_padded_batch_are_watched(tiny):
    model, batch = built(tiny, f"routed[of='{ONE}', experts=3]"), labelled()
    with effzoo.routing.watch(model) as watched:
        model(**batch)
    assert len(watched.routers) == len(mixtures(model))
    assert {usage.tokens for usage in watched.passes} == {int(batch["attention_mask"].sum())}


def test_what_does_not_fit_is_told(tiny):
    base = effzoo.build("bert", task="classification", num_labels=3, **tiny).double()
    with pytest.raises(OptionError, match="no mixture itself"):
        effzoo.attach(base, "routed[of=routed]")
    with pytest.raises(OptionError, match="two 'lora' modules on 'attn.q'"):
        effzoo.attach(base, "routed[of='lora[targets=attn.q]|lora[targets=(attn.q, attn.v)]']")
    with pytest.raises(OptionError, match="give level='example'"):
        effzoo.attach(base, "routed[scope=model]")
    with pytest.raises(UnknownNameError, match=r"router 'softt'"):
        effzoo.attach(base, "routed[router=softt]")
    with pytest.raises(OptionError, match="experts is at least 1"):
        effzoo.attach(base, "routed[experts=0]")
    model = effzoo.attach(copy.deepcopy(base), "routed[router=fixed]")
    with pytest.raises(InputError, match="task_ids="):
        model(**labelled())
    with pytest.raises(InputError, match="integers from 0 to 3"):
        model(**labelled(), task_ids=torch.tensor([0, 1, 4]))
    with pytest.raises(IncompatiblePeft, match="need the graph"):
        effzoo.attach(effzoo.build("bert", **tiny, norm="pre", residual="reversible"), "routed[router=switch]")
    decoder = effzoo.build("gpt2", task="causal_lm", **tiny)
    for spec in ("routed[level=example]", "routed[router=expert_choice]", "routed[of='prefix[length=2, init=normal]']"):
        with pytest.raises(IncompatiblePeft, match="later ones|later tokens"):
            effzoo.attach(decoder, spec)
    effzoo.attach(decoder, "routed[router='top_k[k=1]']")
    with pytest.raises(AdapterError, match="give one that is 'routed' or 'fusion'"):
        effzoo.attach(base, ONE, name="a")
        extract(base, "a", 0, name="b")
    effzoo.attach(base, ONE, name="b")
    with pytest.raises(AdapterError, match="each once"):
        gather(base, ["a", "a"], name="m")
    gather(base, ["a", "b"], name="m")
    with pytest.raises(AdapterError, match="extract its experts first"):
        gather(base, ["a", "m"], name="n")
    assert set(effzoo.attached(base)) == {"a", "b", "m"}
    with pytest.raises(UnknownNameError, match="expert"):
        extract(base, "m", 2, name="x")
    effzoo.activate(base, rows=["m", "m", "m"])
    with pytest.raises(IncompatibleError, match="routes by itself"):
        base(**labelled())


def test_a_causal_model_decodes_with_routed_adapters(tiny):
    model = built(tiny, f"routed[of='{ONE}', experts=3, router='switch']", task="causal_lm", kind="gpt2")
    ids = labelled()["input_ids"][:1]
    cache, whole = Cache(), model(ids).logits
    parts = [model(ids[:, :4], cache=cache).logits, model(ids[:, 4:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **EXACT)


@pytest.mark.slow
def test_a_union_is_an_expert_under_every_attention_kind():
    for kind in effzoo.attention.names():
        found = cell(
            Tuned.of("routed[of='lora[rank=2]|houlsby[bottleneck=2]', experts=2, level=example]"),
            Kind.of(kind),
            "encoder",
        )
        assert found.status == "works", found.reason


def test_the_table_of_skills_is_trained_at_a_hundred_times_the_experts_rate(tiny):
    model = effzoo.build("bert", task="classification", peft="routed[of=pfeiffer, router='skills[tasks=3]']", **tiny)
    rates = effzoo.peft.learning_rates(model)
    table, experts = ({rate for key, rate in rates.items() if part in key} for part in (".table", ".experts."))
    assert len(experts) == 1 and table == {100 * experts.pop()}


def test_two_mixtures_at_one_site_both_act_and_both_learn(tiny):
    """Experts that add to the output: what the two add is the sum of what each adds alone."""
    model = built(tiny, f"routed[of='{ONE}', experts=2]", name="a")
    effzoo.attach(model, f"routed[of='{ONE}', experts=3, level=example]", name="b")
    moved(model, "b", 2)
    batch = labelled()
    site = dict(sites(model))["blocks.0.attn.q"]
    x, _, context = inputs_of(model, "blocks.0.attn.q", batch)
    found = {}
    for active in ((), ("a",), ("b",), ("a", "b"), ("b", "a")):
        effzoo.activate(model, *active)
        with calling(context):
            found[active] = site(x)
    added = {one: found[one] - found[()] for one in found}
    assert min(added[one].abs().max() for one in (("a",), ("b",))) > 1e-3
    for both in (("a", "b"), ("b", "a")):
        torch.testing.assert_close(added[both], added[("a",)] + added[("b",)], **EXACT)
    effzoo.activate(model, "a", "b", train=["a", "b"])
    model(**batch).loss.backward()
    for name in ("a", "b"):
        own = [p for p in site.of(name).parameters() if p.requires_grad]
        assert own and all(p.grad is not None and p.grad.abs().max() > 0 for p in own), name


def test_a_second_mixture_whose_experts_change_the_input_is_refused(tiny):
    model = built(tiny, f"routed[of='{ONE}', experts=2]", name="a")
    effzoo.attach(model, "routed[of='oft[block=4]', experts=2]", name="b")
    effzoo.activate(model, "a", "b")
    with pytest.raises(IncompatibleError, match="two mixtures act here, and experts of the second change the input"):
        model(**labelled())
    effzoo.activate(model, "b", "a")  # the other way round both act
    assert model(**labelled()).loss.isfinite()
