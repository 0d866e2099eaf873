"""The contract of PEFT modules: few members, one context, and old names that are refused with the new one."""

import gc
import hashlib
import json
import pickle
import re
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import effzoo
from effzoo.errors import OptionError
from effzoo.peft import Method, PeftModule, TrainingHooks, method, register
from effzoo.peft.manifest import MANIFEST
from effzoo.registry import scope
from effzoo.sites import Linear, Memory
from effzoo.sites.hooks import EXTRAS, FORMER, NOWHERE, TAKES, at_hand
from tests.support import labelled


@pytest.mark.parametrize("name", FORMER)
def test_a_former_hook_is_refused_with_the_name_of_today(name):
    with pytest.raises(OptionError, match=f"Old defines `{name}`, which is no longer .*: .*"):
        type("Old", (PeftModule,), {name: lambda self, *given: None})
    with pytest.raises(OptionError, match=f"Old defines `{name}`"):  # whoever defines it
        type("Old", (type("Beside", (), {name: None}), PeftModule), {})


@pytest.mark.parametrize("name", TAKES)
def test_a_hook_without_the_context_is_refused(name):
    arguments = {"before": lambda self, x: x, "after": lambda self, x, y: y, "memory": lambda self: None}
    with pytest.raises(
        OptionError, match=rf"Old defines `{name}` with other arguments than it is called with: def {name}\(self"
    ):
        type("Old", (PeftModule,), {name: arguments[name]})
    type("New", (PeftModule,), {name: lambda self, *given: given[0]})


@pytest.mark.parametrize("name", EXTRAS)
def test_what_few_modules_have_is_refused_without_its_class(name):
    with pytest.raises(OptionError, match=rf"Old defines `{name}`, .*: class Old\({EXTRAS[name]}, PeftModule\)"):
        type("Old", (PeftModule,), {name: lambda self, *given: None})


@pytest.mark.parametrize("name", method.FORMER)
def test_a_former_fact_of_a_method_is_refused_with_the_name_of_today(name):
    with pytest.raises(OptionError, match=f"Old says `{name}`, which is no longer read: .*"):
        type("Old", (Method,), {name: ()})


@pytest.mark.parametrize("name", method.OF_TRAINING)
def test_a_hook_of_training_is_refused_where_it_would_not_be_called(name):
    with pytest.raises(OptionError, match=rf"Old has `{name}`, .*: class Old\(TrainingHooks\)"):
        type("Old", (Method,), {name: lambda self, *given: None})
    type("New", (TrainingHooks,), {name: lambda self, *given: None})


def test_a_method_accepts_sites():
    with pytest.raises(
        OptionError, match="Old: accepts is a tuple of site types, such as Linear or MemorySite, got .*Memory"
    ):
        type("Old", (Method,), {"accepts": (Memory,)})


def test_the_contracts_are_small():
    """Eight members of the module, six of the method: what a newcomer reads."""
    hooks = [name for name in vars(PeftModule) if not name.startswith("_")]
    assert sorted(hooks) == ["after", "before", "bias", "delta", "delta_rank", "memory", "prompt", "weight"]
    written = [name for name in vars(Method) if not name.startswith("_")]
    # by `register`, for documents, for `within`, by the user
    elsewhere = {"name", "paper", "size", "targets", "layers"}
    assert sorted({*written} - elsewhere) == [
        "accepts",
        "default_targets",
        "identity_at_init",
        "learning_rate",
        "make",
        "prepare",
    ]


class Watch(PeftModule):
    """y' = y + s, and what it was told of the call."""

    def __init__(self, size):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(size))
        self.told = []

    def after(self, x, y, context):
        self.told.append(context)
        return y + self.shift


@pytest.fixture
def watching():
    with scope():

        @register("watching")
        class Watching(Method):
            """y' = y + s"""

            accepts, default_targets = (Linear,), ("attn.v", "mlp.down")

            def make(self, site):
                return Watch(site.out_features)

        yield "watching"


def test_a_hook_is_told_of_the_call_and_of_its_own_rows(watching, tiny):
    torch.manual_seed(0)
    model, batch = effzoo.build("bert", task="classification", num_labels=3, **tiny).eval(), labelled()
    effzoo.attach(model, watching, name="a")
    effzoo.attach(model, watching, name="b")
    (inner,), (outer,) = (list(model.blocks[0].attn.v.hung("b")), list(model.blocks[0].mlp.down.hung("b")))
    model(**batch, task_ids=torch.tensor([2, 0, 1]))
    valid = batch["attention_mask"].bool()
    (context,), (below,) = inner.told, outer.told
    assert (
        torch.equal(context.valid, valid) and torch.equal(below.valid, valid) and context.task_ids.tolist() == [2, 0, 1]
    )
    assert torch.equal(context.x, model.embeddings(batch["input_ids"])[0]) and torch.equal(context.start, context.x)
    keys, values = context.keys_values(context.x[0])
    assert keys.shape == values.shape == (2, 9, 8) and below.x is None and below.keys_values is None
    effzoo.activate(model, rows=["a", "b", "b"])
    model(**batch, task_ids=torch.tensor([2, 0, 1]))
    context = inner.told[-1]
    assert (
        torch.equal(context.valid, valid[1:])
        and context.task_ids.tolist() == [0, 1]
        and torch.equal(context.mask.valid, valid[1:])
    )
    assert len(context.x) == len(context.start) == 2 and at_hand() is NOWHERE
    whole, part = inner.told[0].mask.key_bias(torch.float32), context.mask.key_bias(torch.float32)
    assert torch.equal(part, whole[1:]), "what a mask remembers is of its own rows"


def test_nothing_of_a_call_is_left_behind_by_what_was_detached(tiny):
    """No list of listeners that grows, no batch that is held, no larger pickle."""
    torch.manual_seed(0)
    model = effzoo.build("bert", task="classification", **tiny)
    fresh = len(pickle.dumps(model))
    for name in ("a", "b", "c"):
        effzoo.attach(model, "routed[of='lora[rank=2]', experts=2, level=example, scope=model]", name=name)
        mask = []
        hook = model.blocks[0].register_forward_pre_hook(
            lambda block, given, mask=mask: mask.append(weakref.ref(given[1]))
        )
        model(labelled()["input_ids"], labels=torch.tensor([0, 1, 0])).loss.backward()
        hook.remove()
        effzoo.detach(model, name)
        gc.collect()
        assert mask[0]() is None
    assert len(pickle.dumps(model)) < fresh + 10_000 and not any("told" in vars(part) for part in model.modules())


@pytest.mark.parametrize(
    "spec",
    [
        "prompt[length=3]",
        "deep_prompt[length=3]",
        "llama_adapter[length=3]",
        "routed[of='deep_prompt[length=3]', experts=2]",
    ],
)
def test_a_file_with_the_former_names_of_prompt_tokens_is_read(tiny, tmp_path, spec):
    torch.manual_seed(0)
    model = effzoo.attach(effzoo.build("bert", task="classification", num_labels=3, **tiny).eval(), spec)
    effzoo.save_adapter(model, tmp_path)
    (file,), manifest = tmp_path.glob("*.safetensors"), tmp_path / MANIFEST
    tensors = load_file(file)
    older = {re.sub(r"\.tokens$", ".prompt", key): x for key, x in tensors.items()}
    assert older.keys() != tensors.keys()
    save_file(older, file)
    content = json.loads(manifest.read_text()) | {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "size": file.stat().st_size,
    }
    del content["manifest_sha256"]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    manifest.write_text(json.dumps({**content, "manifest_sha256": digest}))
    torch.manual_seed(0)
    other = effzoo.load_adapter(effzoo.build("bert", task="classification", num_labels=3, **tiny).eval(), tmp_path)
    assert torch.equal(other(**labelled()).logits, model(**labelled()).logits)


@pytest.mark.slow
def test_a_hook_that_a_plan_watches_computes_position_by_position_as_before(tiny):
    model = effzoo.build("bert", attention="longformer[window=4]", peft="lora", task="classification", **tiny)
    whole, read = (effzoo.plan(model, batch=2, length=32, recompute=level).kept for level in (None, "nothing"))
    assert read < 0.9 * whole  # of the last block, only the positions that the head reads
