"""The lab's analyses of selection and sparsity against their definitions, written out densely."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import effzoo
from effzoo import peft
from effzoo.errors import AdapterError, OptionError, TargetError
from effzoo.lab.analyses.biases import bias_changes, bias_gradients, mean_of
from effzoo.lab.analyses.heads import SPEC, agreement, gain_of_chosen, gates, head_importance, without_heads
from effzoo.lab.analyses.lenet import LeNet
from effzoo.lab.analyses.lottery import Learned, iterative, masked, masks, reshuffled
from effzoo.lab.analyses.pruning import kept_by_size, pruned_weights
from effzoo.lab.analyses.seeds import judged, mean, percent
from effzoo.lab.analyses.sums import cosine, shared, support
from effzoo.lab.analyses.supermasks import TASKS, large_final, large_final_same_sign, overlap, signed_constant, task
from effzoo.lab.analyses.tuning import body_parameters, fast_accuracy, tune
from effzoo.lab.fit import Examples, accuracy, logits
from effzoo.sites import sites


def images(rows=40, height=3, width=5):
    draw = torch.Generator().manual_seed(3)
    return Examples(
        {"pixels": torch.randn(rows, 1, height, width, generator=draw)}, torch.randint(10, (rows,), generator=draw)
    )


def texts(rows=12, n=9, vocab=53, labels=3):
    draw = torch.Generator().manual_seed(4)
    ids = torch.randint(2, vocab, (rows, n), generator=draw)
    return Examples(
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.randint(labels, (rows,), generator=draw)
    )


@pytest.fixture
def bert(tiny):
    return effzoo.build("bert", task="classification", num_labels=3, **tiny).double().eval()


class TestLeNet:
    def test_is_three_products_with_relu_between(self):
        net, data = LeNet(15, hidden=(7, 4), seed=2).double(), images()
        one, two, three = net.matrices()
        x = data.inputs["pixels"].double().flatten(1)
        expected = (three @ (two @ (one @ x.T).clamp(min=0)).clamp(min=0)).T
        out = net(data.inputs["pixels"].double(), data.labels)
        assert torch.allclose(out.logits, expected, atol=1e-12)
        assert torch.allclose(out.loss, F.cross_entropy(expected, data.labels), atol=1e-12)

    def test_has_the_weights_of_the_paper_and_starts_glorot_normal(self):
        net = LeNet(784)
        assert sum(w.numel() for w in net.matrices()) == 266_200 == sum(p.numel() for p in net.parameters())
        for weight in net.matrices():
            assert float(weight.detach().std()) == pytest.approx((2 / sum(weight.shape)) ** 0.5, rel=0.1)

    def test_is_drawn_from_its_seed_alone(self):
        state = torch.get_rng_state()
        first, again, other = LeNet(15, seed=1), LeNet(15, seed=1), LeNet(15, seed=2)
        assert all(torch.equal(a, b) for a, b in zip(first.matrices(), again.matrices(), strict=True))
        assert not torch.equal(first.matrices()[0], other.matrices()[0])
        assert torch.equal(state, torch.get_rng_state())


@pytest.fixture(scope="module")
def found():
    net = LeNet(15, hidden=(11, 7), seed=0)
    start = [w.detach().clone() for w in net.matrices()]
    return (
        start,
        net,
        iterative(net, images(), images(), rounds=3, steps=6, batch=8, every=3, prune=0.25, prune_last=0.1),
    )


class TestLottery:
    def test_each_round_prunes_its_share_of_each_matrix_and_nothing_comes_back(self, found):
        _, _, learned = found
        for number, one in enumerate(learned):
            for i, mask in enumerate(one.masks):
                share = 0.9 if i == 2 else 0.75
                assert int(mask.sum()) == round(share**number * mask.numel())
        for before, after in pairwise(learned):
            assert all(bool((b | ~a).all()) for b, a in zip(before.masks, after.masks, strict=True))
        assert learned[0].left == 1 and learned[-1].left == pytest.approx(
            sum(int(m.sum()) for m in learned[-1].masks) / (11 * 15 + 77 + 70)
        )

    def test_the_model_is_left_as_it_was(self, found):
        start, net, _ = found
        assert all(torch.equal(a, b) for a, b in zip(start, net.matrices(), strict=True))
        assert not peft.attached(net) and all(p.requires_grad for p in net.parameters())

    def test_the_first_mask_keeps_what_plain_training_from_the_start_makes_largest(self, found):
        _, _, learned = found
        net, order = LeNet(15, hidden=(11, 7), seed=0), images().stream(8, 0)
        for _ in range(4):  # what `fit` shows to methods that choose by data
            next(order)
        optimizer = torch.optim.Adam(net.parameters(), lr=1.2e-3)
        for step in range(6):
            for group in optimizer.param_groups:
                group["lr"] = 1.2e-3 * min(1.0, (6 - step) / 5)
            optimizer.zero_grad()
            net(**next(order)).loss.backward()
            optimizer.step()
        for weight, mask, share in zip(net.matrices(), learned[1].masks, (0.75, 0.75, 0.9), strict=True):
            size = weight.detach().abs().flatten()
            expected = torch.zeros_like(size, dtype=torch.bool)
            expected[size.argsort(descending=True)[: round(share * len(size))]] = True
            assert torch.equal(mask.flatten(), expected)

    def test_a_ticket_begins_where_the_network_began(self, found):
        """Trained under its mask from the same start, on the same batches, it is the same network."""
        start, net, learned = found
        peft.attach(net, {"name": "magnitude", "keep": 1.0, "schedule": "oneshot", "targets": "fc.*"})
        for mask, given in zip(masks(net), learned[2].masks, strict=True):
            mask.copy_(given)
        pixels = images().inputs["pixels"]
        one, two, three = (w * m for w, m in zip(start, learned[2].masks, strict=True))
        expected = (pixels.flatten(1) @ one.T).relu() @ two.T
        assert torch.allclose(net(pixels).logits, expected.relu() @ three.T, atol=1e-6)
        peft.detach(net, "default")

    def test_counts_accuracy_at_the_given_steps(self, found):
        _, _, learned = found
        assert [len(one.accuracies) for one in learned] == [2] * 4
        one = Learned(5, [0.2, 0.6, 0.9])
        assert one.reached(0.5) == 10 and one.reached(0.95) is None and one.last == 0.9

    def test_steps_that_are_not_divided_are_refused(self):
        with pytest.raises(OptionError, match="every 4 of 6 steps"):
            iterative(LeNet(15, hidden=(4, 3)), images(), images(), rounds=1, steps=6, every=4)
        with pytest.raises(OptionError, match="divides"):
            masked(LeNet(15, hidden=(4, 3)), [], images(), images(), steps=6, every=4)

    def test_a_given_mask_stays_and_the_rest_is_trained(self):
        net, data = LeNet(15, hidden=(5, 4), seed=1), images()
        given = reshuffled([torch.arange(w.numel()).view_as(w) % 3 == 0 for w in net.matrices()], 5)
        learned = masked(net, given, data, data, steps=4, every=2, batch=8)
        assert len(learned.accuracies) == 2 and all(
            torch.equal(a, b) for a, b in zip(learned.masks, given, strict=True)
        )

    def test_reshuffled_masks_keep_their_numbers(self):
        given = [torch.arange(35).view(5, 7) < 12, torch.arange(6).view(2, 3) < 1]
        drawn = reshuffled(given, 0)
        assert [int(m.sum()) for m in drawn] == [12, 1] and [m.shape for m in drawn] == [m.shape for m in given]
        assert not torch.equal(drawn[0], given[0]) and torch.equal(drawn[0], reshuffled(given, 0)[0])


class TestSupermasks:
    def test_signed_constants_keep_signs_and_one_size(self):
        weight = torch.randn(5, 9, dtype=torch.float64)
        found = signed_constant(weight)
        assert torch.equal(found.sign(), weight.sign()) and torch.allclose(
            found.abs(), weight.std().expand(5, 9), atol=1e-12
        )

    def test_large_final_is_the_largest_share(self):
        start, final = torch.randn(2, 7, 5, dtype=torch.float64)
        mask = large_final(final, 0.4)
        assert int(mask.sum()) == 14 and final.abs()[mask].min() > final.abs()[~mask].max()
        same = large_final_same_sign(start, final, 0.2)
        assert int(same.sum()) == 7 and bool((start.sign() == final.sign())[same].all())
        others = (start.sign() == final.sign()) & ~same
        assert final.abs()[same].min() > final.abs()[others].max()

    def test_tasks_are_what_they_say(self):
        data = images()
        pixels, labels = data.inputs["pixels"], data.labels
        assert torch.equal(task("parity", data).labels, labels.remainder(2)) and torch.equal(
            task("half", data).labels, (labels > 4).long()
        )
        assert torch.equal(task("upside down", data).inputs["pixels"][:, 0, 0], pixels[:, 0, -1])
        shuffled = task("shuffled", data).inputs["pixels"]
        assert torch.equal(
            shuffled.flatten(1).sort(dim=1).values, pixels.flatten(1).sort(dim=1).values
        ) and not torch.equal(shuffled, pixels)
        renamed = task("renamed", data).labels
        assert len({(int(a), int(b)) for a, b in zip(labels, renamed, strict=True)}) == len(labels.unique())
        assert all(len(task(name, data)) == len(data) and task(name, data).labels.max() < 10 for name in TASKS)
        with pytest.raises(OptionError, match="no task 'thirds'"):
            task("thirds", data)

    def test_the_parts_of_the_data_are_changed_in_the_same_way(self):
        data = images()
        for name in ("shuffled", "renamed"):
            whole, part = task(name, data), task(name, data.at(slice(5, 9)))
            assert torch.equal(whole.at(slice(5, 9)).labels, part.labels)
            assert torch.equal(whole.at(slice(5, 9)).inputs["pixels"], part.inputs["pixels"])

    def test_overlap_is_the_share_of_agreement(self):
        one = [torch.tensor([[True, False, True]]), torch.tensor([True])]
        other = [torch.tensor([[True, True, True]]), torch.tensor([False])]
        assert overlap(one, one) == 1 and overlap(one, other) == 0.5


class TestBiases:
    def test_gradients_are_those_of_autograd_and_key_biases_have_none(self, bert):
        batch = texts().batch(slice(0, 4))
        found = bias_gradients(bert, batch)
        bert(**batch).loss.backward()
        for _, site in sites(bert):
            bias = site.base().get("bias")
            if bias is not None:
                expected = 0.0 if bias.grad is None else float(bias.grad.abs().max())
                assert found[site.role][site.layer] == pytest.approx(expected, abs=1e-15)
        assert max(found["attn.k"].values()) < 1e-14 < min(found["attn.q"].values())

    def test_what_is_trainable_stays_so_and_nothing_is_left_behind(self, bert):
        peft.attach(bert, "lora")
        before = [p.requires_grad for p in bert.parameters()]
        bias_gradients(bert, texts().batch(slice(0, 2)))
        assert [p.requires_grad for p in bert.parameters()] == before and all(p.grad is None for p in bert.parameters())

    def test_a_model_without_biases_is_refused(self):
        with pytest.raises(TargetError, match="no biases"):
            bias_gradients(LeNet(15, hidden=(4, 3)), images().batch(slice(0, 2)))

    def test_changes_are_means_of_absolute_differences(self, bert):
        peft.attach(bert, "bitfit[group=(query,value)]")
        with torch.no_grad():
            for _, site in sites(bert):
                for module in site.hung():
                    if hasattr(module, "own_bias") and site.role == "attn.q":
                        module.own_bias += torch.linspace(-1, 1, module.own_bias.numel()) * (site.layer + 1)
        found = bias_changes(bert)
        size = float(torch.linspace(-1, 1, 16).abs().mean())
        assert found["attn.q"] == pytest.approx({0: size, 1: 2 * size}) and mean_of(found, "attn.q") == pytest.approx(
            1.5 * size
        )
        assert found["attn.v"] == {0: 0.0, 1: 0.0} and "attn.k" not in found


class TestHeads:
    def test_importance_is_the_mean_gradient_of_a_gate_on_each_head(self, bert):
        data = texts(rows=5)
        found = head_importance(bert, data, batch=2)
        layers = [site for _, site in sites(bert) if site.role == "attn.o"]
        expected = torch.zeros(2, 2, dtype=torch.float64)
        for row in range(5):
            xi = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
            hooks = [
                site.register_forward_pre_hook(lambda _, given, xi=xi, i=i: (given[0] * xi[i].repeat_interleave(8),))
                for i, site in enumerate(layers)
            ]
            (gradient,) = torch.autograd.grad(bert(**data.batch(slice(row, row + 1))).loss, xi)
            expected += gradient.abs()
            for hook in hooks:
                hook.remove()
        assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-10)
        assert not peft.attached(bert)

    def test_a_head_without_its_gate_is_a_head_whose_columns_are_zero(self, bert):
        """The labels are what the model says with the columns of two heads at 0, so without these heads it is always
        right, else not."""
        data = texts(rows=60)
        layers = [site for _, site in sites(bert) if site.role == "attn.o"]
        with torch.no_grad():
            for site in layers:
                site.weight *= 300  # so that heads decide
            before = [site.weight.clone() for site in layers]
            layers[1].weight[:, 8:] = 0  # head 3 is the second of layer 1, head 0 the first of layer 0
            layers[0].weight[:, :8] = 0
            data = Examples(data.inputs, logits(bert, data).argmax(dim=-1))
            for site, weight in zip(layers, before, strict=True):
                site.weight.copy_(weight)
        whole, without, none = without_heads(bert, torch.tensor([3, 0, 2, 1]), (0, 2, 4), data)
        assert without == 1 and whole == accuracy(bert, data) == fast_accuracy(bert, data) < 1 and none < 1
        assert without_heads(bert, torch.tensor([2, 1, 3, 0]), (2,), data)[0] < 1

    def test_a_head_is_judged_on_other_texts_than_it_is_chosen_on(self):
        lost = torch.tensor([[[1.0, -2.0], [0.0, 3.0]], [[0.5, -1.0], [-4.0, 2.0]]])
        assert gain_of_chosen(lost) == (1 + 0) / 2  # head 1 by the first half, head 2 by the second
        halves = lost.flatten(1).double().numpy()
        assert agreement(lost) == pytest.approx(np.corrcoef(halves[0], halves[1])[0, 1], abs=1e-12)
        assert agreement(torch.ones(2, 3)) == 0

    def test_orders_and_counts_that_do_not_fit_are_refused(self, bert):
        for order, counts in (([0, 1, 2], [0]), ([0, 0, 1, 2], [0]), ([0, 1, 2, 3], [5])):
            with pytest.raises(OptionError, match="each of the 4 heads once"):
                without_heads(bert, torch.tensor(order), counts, texts())
        assert not peft.attached(bert)
        with pytest.raises(AdapterError, match="gates"):
            gates(bert)
        assert len(gates(peft.attach(bert, SPEC))) == 2


class TestPruning:
    def test_shares_by_size_are_counted_in_parts_of_equal_length(self):
        weight = torch.tensor([[0.1, -5.0, 2.0], [-0.3, 0.9, 4.0]])
        mask = torch.tensor([[True, True, False], [False, True, True]])
        assert kept_by_size([weight], [mask], 3) == [0.5, 0.5, 1.0]  # 0.1 | 0.3, 0.9 | 2, 4 | 5
        assert kept_by_size([weight, weight], [mask, ~mask], 2) == [0.5, 0.5]
        with pytest.raises(OptionError, match="got 7"):
            kept_by_size([weight], [mask], 7)

    @pytest.mark.parametrize("keep", [0.2, 0.5])
    def test_pruning_at_once_by_magnitude_keeps_the_upper_parts_alone(self, keep):
        net = peft.attach(LeNet(20, hidden=(10, 10), seed=1), f"magnitude[keep={keep},schedule=oneshot,targets=fc.*]")
        weights, found = pruned_weights(net)
        assert kept_by_size(weights, found, 10) == [0.0] * round(10 * (1 - keep)) + [1.0] * round(10 * keep)

    def test_a_model_that_is_not_pruned_is_refused(self):
        with pytest.raises(AdapterError, match="no active adapter prunes"):
            pruned_weights(LeNet(15))


class TestSums:
    def test_shared_entries_and_cosine_are_those_of_one_long_vector(self):
        draw = torch.Generator().manual_seed(0)
        one = {
            "a": torch.randn(3, 5, generator=draw, dtype=torch.float64),
            "b": torch.randn(7, generator=draw, dtype=torch.float64),
        }
        other = {
            "a": torch.randn(3, 5, generator=draw, dtype=torch.float64),
            "c": torch.randn(2, generator=draw, dtype=torch.float64),
        }
        one["a"][0], other["a"][:, :2] = 0, 0
        x = torch.cat([one["a"].flatten(), one["b"], torch.zeros(2)])
        y = torch.cat([other["a"].flatten(), torch.zeros(7), other["c"]])
        assert support(one) == int((x != 0).sum()) == 17 and support(other) == 11
        assert shared(one, other) == shared(other, one) == int(((x != 0) & (y != 0)).sum()) / 11 == 6 / 11
        assert cosine(one, other) == pytest.approx(float(F.cosine_similarity(x, y, dim=0)), abs=1e-12)
        assert (
            cosine(one, one) == pytest.approx(1) and cosine(one, {"a": torch.zeros(3, 5)}) == 0 and shared(one, {}) == 0
        )

    def test_the_sum_of_two_sparse_changes_is_both_adapters_at_once(self):
        net, data = LeNet(15, hidden=(6, 5), seed=0), images()
        for name, kind in (("inputs", "upside down"), ("labels", "renamed")):
            tune(
                net,
                "lt_sft[keep=0.1,targets=fc.*]",
                task(kind, data),
                name=name,
                steps=4,
                batch=8,
                rate=1e-2,
                bfloat16=False,
            )
        changes = [peft.delta(net, name) for name in ("inputs", "labels")]
        assert [support(change) for change in changes] == [17, 17]  # a tenth of 170
        peft.activate(net, "inputs", "labels")
        both = net(data.inputs["pixels"]).logits
        peft.combine(net, {"inputs": 1.0, "labels": 1.0}, name="sum")
        assert torch.allclose(both, net(data.inputs["pixels"]).logits, atol=1e-6)


class TestTuning:
    def test_counts_what_the_body_trains(self, bert):
        block = sum(p.numel() for p in bert.blocks[1].parameters())
        for spec, expected in (("bitfit[group=query]", 2 * 16), ("freeze[first=1]", block), ("freeze[first=2]", 0)):
            assert body_parameters(peft.attach(bert, spec)) == expected
            peft.detach(bert, "default")

    def test_rates_are_those_of_methods_and_head_apart(self, bert, monkeypatch):
        seen = {}
        from effzoo.lab.analyses import tuning

        monkeypatch.setattr(tuning, "fit", lambda model, *_, **__: seen.update(peft.learning_rates(model)) or [])
        tune(bert, "lora|ia3", texts(), name="one", steps=1, rate=0.25, head_rate=0.5)
        assert {rate for key, rate in seen.items() if "head" in key} == {0.5}
        assert {rate for key, rate in seen.items() if "head" not in key} == {0.25}

    def test_settings_that_are_compared_see_the_same_batches_and_leave_the_base_alone(self, bert):
        before = {key: value.clone() for key, value in bert.state_dict().items()}
        first = tune(bert, "bitfit", texts(), name="one", steps=3, batch=4, seed=5)
        peft.detach(bert, "one")
        assert tune(bert, "bitfit", texts(), name="two", steps=3, batch=4, seed=5) == first
        peft.detach(bert, "two")
        assert all(torch.equal(value, before[key]) for key, value in bert.state_dict().items())


def test_cells_and_claims_of_seeds():
    assert mean([1, 2, 6]) == 3 and percent([0.5, 0.25, 0.75]) == "50.0 (25.0 to 75.0)"
    assert judged(["0", "1"], lambda seed: seed == "1") == (False, True)


@pytest.mark.parametrize(
    "name", ["biases", "freezing", "head_pruning", "lottery", "pruning", "sparse_sums", "supermask"]
)
def test_the_lab_knows_them(name):
    from effzoo.lab import get

    found = get(name)
    assert (
        found.about.endswith("?")
        and "arXiv" in found.source
        and json.dumps(found.decks)
        and not math.isnan(len(found.data))
    )
