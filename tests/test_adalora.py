"""AdaLoRA: importance, budget, masks and penalty are those of the paper, computed another way, and of the package peft;
a run resumes to the same bits, and a pruned adapter goes through files."""

import copy

import peft
import pytest
import torch
import transformers
from peft.tuners.adalora.layer import RankAllocator
from support import StopAt, finetune, labelled

import effzoo
from effzoo import convert
from effzoo.errors import AdapterError, IncompatibleError
from effzoo.peft import training
from effzoo.peft.parameter.adalora import Triplets
from effzoo.train import checkpoints

EXACT = {"rtol": 0, "atol": 1e-12}
SPEC = "adalora[rank=4, keep=0.5, begin=0.2, end=0.8]"


def build(tiny, spec=SPEC, drawn=True):
    torch.manual_seed(3)
    model = effzoo.build("minilm", task="classification", num_labels=3, pooling="mean", head_dense=False, **tiny)
    model = effzoo.attach(model.double(), spec)
    with torch.no_grad():
        for module in triplets(model) if drawn else ():
            for parameter in module.parameters():
                parameter.normal_(0, 0.5)
    return model


def triplets(model):
    return [module for module in model.modules() if isinstance(module, Triplets)]


def steps(model, count, total, first=0, lr=5e-2):
    """The loop of `effzoo/peft/training.py`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(first, first + count):
        training.schedule(model, step / total)
        training.loss(model, **labelled()).backward()
        training.after_backward(model)
        optimizer.step()
        optimizer.zero_grad()


def test_importance_is_smoothed_sensitivity_times_its_uncertainty_of_the_whole_triplet(tiny):
    """Entry by entry, from I = |w g| of every step so far (Zhang et al. 2023, eq. 7-11)."""
    model = build(tiny, "adalora[rank=3, beta1=0.7, beta2=0.6]")
    module, seen = triplets(model)[1], []
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
        seen.append({name: (p * p.grad).abs().detach().tolist() for name, p in module.named_parameters()})
        training.after_backward(model)
        with torch.no_grad():
            module.P.mul_(1.1)

    def score(values):
        smooth = uncertain = 0.0
        for now in values:
            smooth = 0.7 * smooth + 0.3 * now
            uncertain = 0.6 * uncertain + 0.4 * abs(now - smooth)
        return smooth * uncertain

    outputs, inputs = len(module.P), module.Q.shape[1]
    wanted = [
        score([one["E"][i] for one in seen])
        + sum(score([one["P"][j][i] for one in seen]) for j in range(outputs)) / outputs
        + sum(score([one["Q"][i][j] for one in seen]) for j in range(inputs)) / inputs
        for i in range(3)
    ]
    assert torch.allclose(module.importance(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_entries_that_are_kept_are_those_of_peft(tiny):
    """The same weights and gradients in both, over several steps."""
    torch.manual_seed(1)
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
            max_position_embeddings=20,
        )
    ).double()  # fmt: skip
    config = peft.AdaLoraConfig(target_modules=["query", "value"], init_r=4, target_r=2, total_step=10)
    ours = effzoo.attach(convert.from_transformers(copy.deepcopy(base)), SPEC[:-1] + ", targets=(attn.q, attn.v)]")
    theirs = peft.get_peft_model(base, config)
    pairs = []
    for i in range(2):
        for role, name in (("q", "query"), ("v", "value")):
            module = getattr(ours.blocks[i].attn, role).adapters["default"]["adalora"]
            layer = getattr(theirs.base_model.model.bert.encoder.layer[i].attention.self, name)
            pairs.append((f"bert.encoder.layer.{i}.attention.self.{name}.lora_E.default", module, layer))
    allocator = RankAllocator(theirs.base_model.model, config, "default")
    for _ in range(3):
        for _, module, layer in pairs:
            for our, their in ((module.P, layer.lora_B), (module.E, layer.lora_E), (module.Q, layer.lora_A)):
                our.data.normal_()
                our.grad = torch.randn_like(our)
                their["default"].data.copy_(our.detach().view_as(their["default"]))
                their["default"].grad = our.grad.view_as(their["default"]).clone()
                their["default"].requires_grad_(True)
        for layer in (layer for _, _, layer in pairs):
            layer.ranknum["default"].grad = torch.zeros_like(layer.ranknum["default"])
        training.after_backward(ours)
        allocator.update_ipt(theirs.base_model.model)
    pattern = allocator.mask_to_budget(theirs.base_model.model, 8)
    training.schedule(ours, 0.9)
    kept = {name: module.mask.tolist() for name, module, _ in pairs}
    assert kept == pattern and sum(map(sum, kept.values())) == 8
    for _, module, layer in pairs:
        assert torch.equal(module.E, layer.lora_E["default"][:, 0]) and module.E.count_nonzero() == module.mask.sum()


def test_the_budget_falls_as_the_cube_and_then_stays_where_it_is(tiny):
    model, kept, masks = build(tiny), [], []
    total = sum(len(module.mask) for module in triplets(model))
    for step in range(20):
        steps(model, 1, 20, step)
        kept.append(sum(int(module.mask.sum()) for module in triplets(model)))
        masks.append(torch.cat([module.mask for module in triplets(model)]))
    through = [min(1.0, max(0.0, (step / 20 - 0.2) / 0.6)) for step in range(20)]
    assert kept == [max(1, round(total * (0.5 + 0.5 * (1 - t) ** 3))) for t in through]
    assert kept[:5] == [total] * 5 and kept[-1] == total // 2
    assert all(torch.equal(mask, masks[-1]) for mask in masks[16:])


def test_until_the_end_a_triplet_that_became_important_comes_back(tiny):
    model = build(tiny)
    steps(model, 9, 20)
    module = next(module for module in triplets(model) if not module.mask.all())
    place = int((~module.mask).nonzero()[0])
    module.sensitivity_E[place] = module.uncertainty_E[place] = 1e3
    training.schedule(model, 0.5)
    assert module.mask[place] and module.E[place] != 0


def test_a_masked_triplet_does_nothing_and_its_entry_gets_the_gradient_that_it_has_at_0(tiny):
    model, twin = build(tiny), build(tiny)
    twin.load_state_dict(model.state_dict())
    for masked, zero in zip(triplets(model), triplets(twin), strict=True):
        masked.mask[1:3] = False
        zero.E.data[1:3] = 0
    for one in (model, twin):
        one(**labelled()).loss.backward()
    assert torch.equal(model(**labelled()).logits, twin(**labelled()).logits)
    for masked, zero in zip(triplets(model), triplets(twin), strict=True):
        for one, other in zip(masked.parameters(), zero.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, **EXACT) and masked.E.grad[1:3].abs().min() > 0


def test_the_penalty_is_the_distance_of_both_factors_from_orthonormal_ones(tiny):
    model = build(tiny, "adalora[rank=3, orthogonality=0.3]")
    eye = torch.eye(3, dtype=torch.float64)
    wanted = 0.3 * sum(
        ((module.P.T @ module.P - eye) ** 2).sum() + ((module.Q @ module.Q.T - eye) ** 2).sum()
        for module in triplets(model)
    )
    assert torch.allclose(training.penalty(model), wanted, **EXACT) and wanted > 1
    assert training.penalty(build(tiny, "adalora[orthogonality=0.0]")) is None


def test_without_gradients_nothing_is_chosen(tiny):
    model = build(tiny)
    training.schedule(model, 0.1)
    with pytest.raises(IncompatibleError, match="has seen none: call effzoo.peft.after_backward"):
        training.schedule(model, 0.5)


def test_a_pruned_adapter_is_stored_as_what_it_keeps_and_trains_on_pruned(tiny, tmp_path):
    model = build(tiny)
    steps(model, 10, 10)
    model.eval()
    before = model(**labelled()).logits
    unfinished = effzoo.account(model).stored
    training.finish(model)
    assert torch.equal(model(**labelled()).logits, before)
    kept = sum(int(module.mask.sum()) for module in triplets(model))
    width, bits, head = 16 + 16 + 1, len(triplets(model)), 16 * 3 + 3
    assert effzoo.account(model).stored == kept * width + bits + head < unfinished
    effzoo.save_adapter(model, tmp_path)
    loaded = effzoo.load_adapter(build(tiny, "lora", drawn=False), tmp_path, name="other")
    effzoo.activate(loaded, "other")
    assert torch.equal(loaded.eval()(**labelled()).logits, before)
    masks = [module.mask.clone() for module in triplets(model)]
    steps(model, 3, 3)
    for module, mask in zip(triplets(model), masks, strict=True):
        assert torch.equal(module.mask, mask) and torch.equal(module.values() != 0, mask)
    merged = effzoo.merge(copy.deepcopy(model.eval()))
    assert torch.allclose(merged(**labelled()).logits, model(**labelled()).logits, rtol=0, atol=1e-10)


def test_what_peft_has_pruned_is_read_and_written_with_its_pattern(tmp_path):
    torch.manual_seed(1)
    base = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=41, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
            max_position_embeddings=20,
        )
    ).double()  # fmt: skip
    config = peft.AdaLoraConfig(
        task_type="SEQ_CLS", target_modules=["query", "value"], init_r=4, target_r=2, total_step=6, tfinal=2,
    )  # fmt: skip
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    ids, labels = torch.randint(5, 41, (3, 9)), torch.tensor([0, 1, 1])
    trained = [p for name, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in name]
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(6):
        theirs(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        theirs.zero_grad()
    expected = theirs.eval()(input_ids=ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    ours = effzoo.load_adapter(convert.from_transformers(copy.deepcopy(base)), tmp_path / "theirs").eval()
    assert torch.allclose(ours(ids).logits, expected, rtol=0, atol=1e-10)
    masks = [module.mask for module in triplets(ours)]
    assert sum(int(mask.sum()) for mask in masks) == 8 and len({int(mask.sum()) for mask in masks}) > 1
    effzoo.save_adapter(ours, tmp_path / "ours", format="peft")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").double().eval()
    assert torch.allclose(back(input_ids=ids).logits, expected, rtol=0, atol=1e-10)
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(file.read_text().replace('"init_r": 4', '"init_r": 5'))
    with pytest.raises(AdapterError, match="rank_pattern says of 4 triplets .* and init_r is 5"):
        effzoo.load_adapter(convert.from_transformers(copy.deepcopy(base)), tmp_path / "theirs")


@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_resumes_to_the_same_bits(tiny, tmp_path, step):
    rows = [{"input_ids": [2 + i % 7, 9, 11, 3 + i], "labels": i % 3} for i in range(10)]
    settings = {"max_steps": 6, "batch_size": 4, "save_every": 1, "log_every": 1, "progress": False}
    model = build(tiny, drawn=False).float()
    whole = finetune(model, rows, output_dir=tmp_path / "whole", **settings)
    assert (
        0 < sum(int(module.mask.sum()) for module in triplets(model)) == sum(len(m.mask) for m in triplets(model)) // 2
    )
    with pytest.raises(KeyboardInterrupt):
        folder = tmp_path / str(step)
        finetune(build(tiny, drawn=False).float(), rows, output_dir=folder, callbacks=[StopAt(step)], **settings)
    assert checkpoints.whole(folder)[-1].name == f"checkpoint-{step}"
    other = build(tiny, drawn=False).float()
    assert finetune(other, rows, output_dir=folder, resume=True, **settings).history == whole.history
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
