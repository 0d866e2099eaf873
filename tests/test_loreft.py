"""LoReFT edits the hidden states that the paper's equation says, at the first and last tokens, wherever padding is."""

import copy

import pytest
import torch
from support import labelled

import effzoo
from effzoo.attention import Cache
from effzoo.errors import AdapterError, IncompatiblePeft, OptionError
from effzoo.peft.function.loreft import Intervention, orthonormal
from effzoo.sites import Stream

EXACT = {"rtol": 0, "atol": 1e-10}


def build(tiny, spec="loreft[rank=3, first=2, last=1]", name="minilm", **more):
    torch.manual_seed(3)
    model = effzoo.build(name, **{"task": "features", **tiny, **more}).double()
    model = effzoo.attach(model, spec) if spec else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def edits(model):
    return [module for module in model.modules() if isinstance(module, Intervention)]


def by_hand(model, mask, ids):
    """Block after block without the adapter, token by token between them: h + R^T (W h + b - R h) (eq. 2)."""
    with effzoo.disabled(model):
        hidden = []
        handles = [
            block.register_forward_hook(lambda block, x, h: hidden.append(edited(block, h, mask)) or hidden[-1])
            for block in model.blocks
        ]
        out = model(ids, attention_mask=mask).last_hidden_state
        for handle in handles:
            handle.remove()
    return out


def edited(block, h, mask):
    part = block.stream.of("default")["loreft"]
    R, rows = orthonormal(part.V), []
    for states, tokens in zip(h, mask.bool(), strict=True):
        places = tokens.nonzero()[:, 0].tolist()
        wanted = {*places[: part.first], *(places[-part.last :] if part.last else [])}
        rows.append(
            torch.stack(
                [
                    x + R.T @ (part.source.weight @ x + part.source.bias - R @ x) if i in wanted else x
                    for i, x in enumerate(states)
                ]
            )
        )
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["minilm", "modernbert"])
@pytest.mark.parametrize("side", ["left", "right", "short"])
def test_the_first_and_last_tokens_are_edited_as_in_the_paper(tiny, name, side):
    """Forward and backward, in a post-norm and in a pre-norm model."""
    model = build(tiny, name=name)
    ids, mask = torch.randint(5, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    padding = {"left": (slice(0, 4)), "right": (slice(5, 9)), "short": (slice(2, 9))}[side]
    mask[1, padding] = 0
    found, wanted = model(ids, attention_mask=mask).last_hidden_state, by_hand(model, mask, ids)
    at = mask.bool()
    assert torch.allclose(found[at], wanted[at], **EXACT)
    with effzoo.disabled(model):
        assert (model(ids, attention_mask=mask).last_hidden_state - found)[at].abs().max() > 1e-3
    parameters = [p for module in edits(model) for p in module.parameters()]
    mixture = torch.randn_like(found[at])
    one, other = (torch.autograd.grad((out[at] * mixture).sum(), parameters) for out in (found, wanted))
    for mine, theirs in zip(one, other, strict=True):
        assert torch.allclose(mine, theirs, **EXACT) and mine.abs().max() > 1e-6


def test_rows_stay_orthonormal_while_training(tiny):
    model = build(tiny, task="classification", num_labels=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = [orthonormal(module.V).detach() for module in edits(model)]
    for _ in range(5):
        model(**labelled()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module, old in zip(edits(model), before, strict=True):
        R = orthonormal(module.V)
        assert torch.allclose(R @ R.T, torch.eye(3, dtype=torch.float64), **EXACT)
        assert not torch.allclose(R, old, rtol=0, atol=1e-2)


@pytest.mark.parametrize("padded", [False, True])
def test_a_decoder_that_decodes_edits_the_same_tokens(tiny, padded):
    model = build(tiny, "loreft[rank=3, first=4]", name="gpt2", task="causal_lm")
    ids, mask = torch.randint(5, 50, (2, 8)), torch.ones(2, 8, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    given = {"attention_mask": mask} if padded else {}
    whole, cache, steps = model(ids, **given).logits, Cache(), []
    for start, end in ((0, 3), (3, 4), (4, 8)):
        part = {"attention_mask": mask[:, :end]} if padded else {}
        steps.append(model(ids[:, start:end], cache=cache, **part).logits)
    at = mask.bool()
    assert torch.allclose(torch.cat(steps, dim=1)[at], whole[at], **EXACT)


def test_packed_documents_are_edited_each(tiny):
    model = build(tiny, "loreft[rank=2, first=2, last=1]")
    ids = torch.randint(5, 50, (1, 9))
    numbers = torch.tensor([[1, 1, 1, 1, 1, 2, 2, 2, 2]])
    packed = model(ids, document_ids=numbers).last_hidden_state
    apart = torch.cat([model(ids[:, :5]).last_hidden_state, model(ids[:, 5:]).last_hidden_state], dim=1)
    assert torch.allclose(packed, apart, **EXACT)


def test_counts_and_files(tiny, tmp_path):
    model = build(tiny, "loreft[rank=3]")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * (2 * 16 + 1)
    assert effzoo.attached(model)["default"].spec == "loreft[rank=3, last=4]"
    assert str(effzoo.peft.within(build(tiny, None), "loreft", 250)) == "loreft[rank=3]"
    effzoo.save_adapter(model, tmp_path)
    bare = copy.deepcopy(model)
    effzoo.detach(bare, "default")
    ids = torch.randint(5, 50, (2, 9))
    again = effzoo.load_adapter(bare, tmp_path).eval()
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


def test_what_has_no_meaning_is_refused(tiny):
    model = build(tiny)
    with pytest.raises(AdapterError, match="edits the hidden states of some positions alone, and a weight acts on all"):
        effzoo.merge(model)
    decoder = build(tiny, None, name="gpt2", task="causal_lm")
    with pytest.raises(IncompatiblePeft, match=r"loreft\[last=2\] does not work with a causal block"):
        effzoo.attach(decoder, "loreft[last=2]")
    assert effzoo.attached(effzoo.attach(decoder, "loreft"))["default"].spec == "loreft[last=0]"
    with pytest.raises(OptionError, match="no token is edited"):
        build(tiny, "loreft[first=0]")
    with pytest.raises(OptionError, match="at most 16 orthonormal rows"):
        build(tiny, "loreft[rank=17]")


def test_an_encoder_decoder_edits_both_stacks_and_counts_from_the_end_in_its_encoder_alone():
    torch.manual_seed(3)
    sizes = {"layers": 2, "dim": 16, "heads": 2, "mlp": 32, "vocab": 53, "max_length": 64}
    model = effzoo.build("bart", task="seq2seq_lm", **sizes).double()
    decoder = [site for site in model.modules() if isinstance(site, Stream) and site.causal]
    encoder = [site for site in model.modules() if isinstance(site, Stream) and not site.causal]
    assert len(decoder) == len(encoder) == 2
    with pytest.raises(IncompatiblePeft, match="a causal block"):
        effzoo.attach(model, "loreft[last=1]")
    effzoo.attach(model, f"loreft[last=1, layers=({encoder[0].layer}, {encoder[1].layer})]", name="in_the_encoder")
    effzoo.attach(model, "loreft[first=3]").eval()
    ids = torch.randint(5, 50, (2, 7))
    edited, cached = (effzoo.generate(model, ids, max_new_tokens=6, use_cache=use_cache) for use_cache in (False, True))
    assert torch.equal(edited, cached)
