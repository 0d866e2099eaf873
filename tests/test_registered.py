"""Every tensor that a model computes with is a parameter or a buffer of it: what trains, moves, saves and counts sees
all of it."""

import copy
import dataclasses
import pickle
from collections.abc import Mapping

import pytest
import torch
from support import small

import effzoo

PERCEIVER = {
    "channels": 12, "latents": 10, "head_dim": 4, "value_dim": 8, "cross_heads": 1, "cross_head_dim": 8,
    "cross_value_dim": 16, "decoder_head_dim": 4, "decoder_value_dim": 4,
}  # fmt: skip
CAUSAL = [kind for kind in effzoo.attention.names() if not effzoo.attention.get(kind).not_causal]
KINDS = [small(kind) for kind in effzoo.attention.names()] + [
    "linformer[k=8, sharing=layerwise]",
    "linformer[k=8, sharing=layerwise, projection=conv]",
]
MODELS = [(name, kind) for name in ("bert", "perceiver-io") for kind in KINDS] + [
    (name, small(kind)) for name in ("llama", "gpt2") for kind in CAUSAL
]


def build(name, kind, tiny, **more):
    sizes = PERCEIVER if name == "perceiver-io" else {"kv_heads": 1} if name == "llama" else {}
    return effzoo.build(name, attention=kind, task="token_classification", num_labels=3, **tiny, **sizes, **more)


def held(model):
    """{id: tensor} of every tensor that an attribute of a module leads to, through containers, dataclasses and modules
    that are not registered."""
    found, seen, todo = {}, set(), list(model.modules())
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found[id(thing)] = thing
        elif isinstance(thing, torch.nn.Module):
            todo += vars(thing).values()
        elif isinstance(thing, Mapping):
            todo += thing.values()
        elif isinstance(thing, (list, tuple, set, frozenset)):
            todo += thing
        elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
            todo += [getattr(thing, f.name) for f in dataclasses.fields(thing)]
    return found


def assert_registered(model):
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    stray = [tuple(tensor.shape) for key, tensor in held(model).items() if key not in known]
    assert not stray, f"tensors of shape {stray} belong to no module"


@pytest.mark.parametrize(("name", "kind"), MODELS)
def test_every_tensor_is_a_parameter_or_a_buffer(name, kind, tiny):
    model = build(name, kind, tiny)
    assert_registered(model)
    assert_registered(copy.deepcopy(model))
    assert_registered(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize(
    "peft",
    ["lora", "houlsby", "prefix[length=2]", "ladder", "routed[of=lora, experts=2]", "compacter", "intrinsic[dim=4]"],
)
def test_adapters_are_registered_too(peft, tiny):
    assert_registered(build("bert", "linformer[k=8, sharing=layerwise]", tiny, peft=peft))


BERTS = [("bert", {}), ("bert", {"layers": 4, "share_layers": 2})]
PERCEIVERS = [("perceiver-io", {}), ("perceiver-io", {"cross_attends": 2, "share_blocks": "none"})]
WAYS = [(*model, way) for model in BERTS + PERCEIVERS for way in ("built", "copied", "pickled")] + [
    (*model, "swapped") for model in BERTS
]


@pytest.mark.parametrize(("name", "more", "way"), WAYS)
def test_the_matrix_that_layers_share_is_one_trained_saved_counted_and_moved_parameter(name, more, way, tiny):
    model = build(name, "full" if way == "swapped" else "linformer[k=8, sharing=layerwise]", {**tiny, **more})
    if way == "swapped":
        effzoo.swap_attention(model, "linformer[k=8, sharing=layerwise]")
    model = (
        copy.deepcopy(model) if way == "copied" else pickle.loads(pickle.dumps(model)) if way == "pickled" else model
    )
    matrices = [parameter for key, parameter in model.named_parameters() if key.endswith("core.E.weight")]
    assert len(matrices) == 1 and [key for key in model.state_dict() if key.endswith("core.E.weight")]
    E = matrices[0]
    ids = torch.randint(53, (2, 20))
    model(ids, labels=torch.randint(3, (2, 20))).loss.backward()
    assert E.grad is not None and E.grad.abs().max() > 0
    before = model.eval()(ids).logits
    with torch.no_grad():
        E.copy_(torch.randn_like(E))
    assert (model(ids).logits - before).abs().max() > 1e-6
    assert model.double()(ids).logits.dtype is torch.float64
    other = build(name, "linformer[k=8, sharing=layerwise]", {**tiny, **more}).double().eval()
    other.load_state_dict(model.state_dict())
    assert other(ids).logits.equal(model(ids).logits)
    counted = effzoo.account(model)
    assert (
        counted.total
        == counted.trainable
        == sum(tensor.numel() for tensor in held(model).values() if isinstance(tensor, torch.nn.Parameter))
    )


def test_a_layer_that_is_built_again_holds_the_shared_matrix(tiny):
    """As when the attention of a block is replaced by another of its kind."""
    from effzoo.blocks.block import attention_layer
    from effzoo.spec import parse_one

    model = build("bert", "linformer[k=8, sharing=layerwise]", tiny)
    block = model.blocks[0]
    block.attn = attention_layer(
        model.config.slots(0), parse_one("linformer[k=8, sharing=layerwise]"), block.attn.core.context
    )
    assert_registered(model)
    model.double()(torch.randint(53, (2, 20)), labels=torch.randint(3, (2, 20))).loss.backward()
    assert model.blocks[0].attn.core.E.weight.grad.abs().max() > 0


def test_what_a_subclass_passes_on_is_checked_by_the_class_that_gets_it():
    with effzoo.scope():

        @effzoo.peft.register("own_lora")
        class Own(effzoo.registry.peft.get("lora")):
            """LoRA whose rank is declared without its range."""

            def __init__(self, *, rank: int = 4):
                super().__init__(rank=rank)

        assert effzoo.registry.peft.create("own_lora[rank=2]").rank == 2
        with pytest.raises(effzoo.errors.OptionError, match="own_lora: rank is at least 1, got 0"):
            effzoo.registry.peft.create("own_lora[rank=0]")
