"""Adapters on a base whose weights are tensors of codes, as torchao makes them.

torchao 0.18 itself (int8, weights alone) was run by hand: it trains, saves and loads, and what is refused here is
refused there.
"""

import pytest
import torch
from torch.nn import functional as F

import effzoo
from effzoo.errors import AdapterError, IncompatibleError


class Int8(torch.Tensor):
    """Codes and a scale for each row; of all operators it has linear, detach and copies."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def dequantize(self):
        return self.codes * self.scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *rest = args
            return F.linear(x, weight.dequantize(), *rest)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        if function is torch.ops.aten._to_copy.default:
            place = (kwargs or {}).get("device")
            return cls(args[0].codes.to(place), args[0].scale.to(place))
        raise NotImplementedError(f"Int8 has no {function}")


def built(seed=0):
    torch.manual_seed(seed)
    model = effzoo.build("bert", task="classification", layers=1, dim=32, heads=2, mlp=32, vocab=50, max_length=32)
    for block in model.blocks:
        for site in (block.attn.q, block.attn.v, block.mlp.up, model.head.dense, model.head.out):
            site.weight = torch.nn.Parameter(Int8.of(site.weight.detach()), requires_grad=False)
    return model


IDS = torch.arange(5, 15).view(2, 5)


def test_an_adapter_on_codes_is_trained_saved_and_loaded(tmp_path):
    model = effzoo.attach(built(), "lora[rank=2]")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model.eval()(IDS).logits
    for _ in range(3):
        model.train()(IDS, labels=torch.tensor([0, 1])).loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad), "the copy of the head as well"
        optimizer.step()
    effzoo.save_adapter(model, tmp_path)
    again = effzoo.load_adapter(built(), tmp_path)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)
    assert not torch.equal(model(IDS).logits, before)
    other = built()
    other.blocks[0].attn.q.weight.codes[0, 0] += 1
    with pytest.raises(AdapterError, match=r"another base .*attn\.q\.weight"):
        effzoo.load_adapter(other, tmp_path)


def test_what_codes_cannot_do_is_refused_with_what_to_do(tmp_path):
    model = effzoo.attach(built(), "lora[rank=2]")
    with pytest.raises(AdapterError, match=r"attn\.q\.weight is of Int8, whose codes take no sum; keep it attached"):
        effzoo.merge(model)
    assert list(effzoo.attached(model)) == ["default"]
    with pytest.raises(IncompatibleError, match=r"is a Int8, which no safetensors file holds; effzoo\.quantise"):
        effzoo.save(model, tmp_path)
