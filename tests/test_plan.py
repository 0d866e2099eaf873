"""`effzoo.plan` predicts, byte for byte, what autograd keeps in a real pass: for every attention kind x every
fine-tuning method."""

import importlib

import pytest
import torch
from support import SIZES, sizes_of, task_of
from torch import nn
from typer.testing import CliRunner

import effzoo
from effzoo.checks.attention import Subject as Kind
from effzoo.checks.peft import Subject as Method
from effzoo.cli import app
from effzoo.errors import EffzooError, IncompatibleError, InputError, OptionError
from effzoo.parallel import OverRanks, counted
from effzoo.parallel.ranks import Planned
from effzoo.plans import OPT_SLIDE, OPT_SLIDE_REMARK, lecture_activations, opt_table, plan, spread
from effzoo.plans.optimizers import STATES
from effzoo.plans.shadow import LiveBytes, Shadows
from effzoo.train.optimizers import OPTIMIZERS

TRAINED = {"dropout": 0.1, "attention_dropout": 0.1}


def kept(model: nn.Module, autocast: torch.dtype | None = None, call=None, **inputs: torch.Tensor) -> int:
    """The oracle: bytes of the storages that a real forward pass saves, each once, without parameters, buffers and
    inputs."""
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # held, so that no address is used twice
        saved[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        model.train()
        output = (call or model)(**inputs)
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers(), *inputs.values())}
    assert output is not None
    return sum(nbytes for address, (nbytes, _) in saved.items() if address not in own)


def call(model, batch: int, length: int, padded: bool = False) -> dict[str, torch.Tensor]:
    """A call of a model of the zoo, as `plan` makes it up from batch and length; padded: with padding behind the first
    sequence."""
    inputs = {"input_ids": torch.randint(2, 53, (batch, length))}
    if padded:
        inputs["attention_mask"] = (
            torch.arange(length) < torch.tensor([length - length // 3] + [length] * (batch - 1))[:, None]
        ).long()
    if model.task != "features":
        inputs["labels"] = torch.zeros(batch, *[length] * (model.task != "classification"), dtype=torch.long)
    return inputs


@pytest.fixture(scope="module")
def kinds():
    return {name: Kind.of(name) for name in effzoo.attention.names()}


def built(kind: Kind, dropout: float, method: str | None):
    """An encoder, and a decoder where the kind can be causal and the method takes one; of one layer but where the kind
    is full, since layers plan alike, and for the method that trains the last two."""
    layers = 2 if kind.spec.name == "full" or method == "last" else 1
    for name, task in (("bert", "classification"), ("gpt2", "token_classification"))[: 1 + (not kind.cls.not_causal)]:
        model = effzoo.build(
            name,
            attention=str(kind.spec),
            task=task,
            dropout=dropout,
            attention_dropout=dropout,
            **SIZES | {"layers": layers},
        )
        if method is not None and not (method == "pals" and name == "gpt2"):
            effzoo.attach(model, Method.of(method).spec)
        yield model


ON_TEXT = [method for method in effzoo.peft.names() if method != "residual_adapter"]  # which is for convolutions
PAIRS = [  # every method and every kind, not all of their product: that takes minutes
    *((kind, method) for kind in effzoo.attention.names() for method in (None, "lora", "prefix", "houlsby")),
    *(
        (kind, method)
        for kind in ("full", "longformer")
        for method in ON_TEXT
        if method not in ("lora", "prefix", "houlsby")
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("attention", "method"), PAIRS)
def test_activations_are_those_of_a_real_pass(kinds, attention, method):
    """With dropout everywhere and padding, at a prime length."""
    for model in built(kinds[attention], dropout=0.1, method=method):
        inputs = call(model, 2, 37, padded=True)
        assert plan(model, inputs=inputs).kept == kept(model, **inputs) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "method"),
    [*((attention, None) for attention in effzoo.attention.names()), *(("full", method) for method in ON_TEXT)],
)
def test_activations_are_those_of_a_real_pass_without_dropout(kinds, attention, method):
    """Of the fused kernel, and without a mask; at a length of 1 too."""
    for model in built(kinds[attention], dropout=0.0, method=method):
        for length in (1, 37):
            assert plan(model, batch=2, length=length).kept == kept(model, **call(model, 2, length))


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, "lora[dropout=0.1]", "prefix[length=3]"])
@pytest.mark.parametrize("residual", ["plain", "reversible"])
@pytest.mark.parametrize("attention", ["full", "longformer[window=8]", "lsh[chunk=8]"])
def test_what_is_computed_again_is_not_kept(attention, residual, method):
    """Under checkpointing and in reversible models, whose graphs are made a second time in the backward pass."""
    model = effzoo.build(
        "bert",
        attention=attention,
        norm="pre",
        residual=residual,
        peft=method,
        task="token_classification",
        **SIZES,
        **TRAINED,
    )
    for again in (True, False):
        found = plan(model, batch=2, length=37, checkpointing=again)
        (model.gradient_checkpointing_enable if again else model.gradient_checkpointing_disable)()
        assert found.kept == kept(model, **call(model, 2, 37))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["nothing", "hidden", "blocks"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", [None, "lora", "ia3", "houlsby"])
def test_what_finetune_recomputes_is_not_kept(kinds, method, dropout, level):
    for model in built(kinds["full"], dropout=dropout, method=method):
        found = plan(model, batch=2, length=37, recompute=level)
        model.recompute, model.only_what_is_read = level, True
        assert found.kept == kept(model, **call(model, 2, 37))


@pytest.mark.cover()
@pytest.mark.parametrize("method", [None, "lora", "houlsby"])
@pytest.mark.parametrize("precision", ["plain", "autocast", "master"])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])
def test_half_precision_is_planned_as_it_runs(attention_dropout, precision, method):
    sizes = SIZES | {"dropout": 0.1, "attention_dropout": attention_dropout}
    model = effzoo.build("gpt2", peft=method, task="causal_lm", **sizes)
    found = plan(model, batch=2, length=37, dtype="bfloat16", precision=precision)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # in float32, whatever the base is
    held = sum(p.numel() for name, p in model.named_parameters() if ".adapters." in name)
    count = sum(p.numel() for p in model.parameters())
    wide = 4 if precision == "autocast" else 2
    of_trained = wide if method is None else 4
    assert (found.weights, found.gradients, found.trainable) == (
        wide * (count - held) + 4 * held,
        of_trained * trained,
        trained,
    )
    assert found.optimizer == 2 * trained * (4 if precision == "master" else of_trained)
    assert found.master == (4 * trained if precision == "master" and method is None else 0)
    assert ("half copies of weights" in found.activations) == (precision == "autocast")
    if precision != "autocast":
        model = effzoo.peft.recast(model.bfloat16())
    assert found.kept == kept(model, torch.bfloat16 if precision == "autocast" else None, **call(model, 2, 37))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["nothing", "hidden", "blocks"])
@pytest.mark.parametrize(
    "method", ["lora", "ia3", "houlsby", "full", "prefix", "dora", "fish", "mam", "routed", "far", "ladder"]
)
def test_float32_adapters_of_a_half_base_are_planned_as_they_run(method, level):
    model = effzoo.build("bert", task="classification", **SIZES | {"dropout": 0.1}).bfloat16()
    effzoo.attach(model, method)
    found = plan(model, batch=2, length=37, recompute=level)
    model.recompute, model.only_what_is_read = level, True
    assert found.kept == kept(model, **call(model, 2, 37))


@pytest.mark.slow
@pytest.mark.parametrize("name", effzoo.models())
def test_a_name_is_planned_like_the_built_model(name):
    """Every entry of the zoo, made small: by name, on the meta device, and built."""
    config, sizes = effzoo.zoo.config(name), sizes_of(name)
    task = task_of(name)
    if getattr(config, "experts", 0):  # whose numbers of tokens are known when they run
        with pytest.raises(IncompatibleError, match="depends on the values"):
            plan(name, batch=2, length=37, **sizes)
        return
    model = effzoo.build(name, task=task, **sizes)
    length = 36 if name == "perceiver" else 37
    inputs = call(model, 2, length)
    if name == "perceiver":
        inputs = {"inputs_embeds": torch.randn(2, 6, 6, config.channels), "labels": torch.zeros(2, dtype=torch.long)}
    for method in (None, "lora", "houlsby"):
        found = plan(name, method, batch=2, length=length, **sizes)
        if method is not None:
            effzoo.attach(model, method, name=method)
        assert found.kept == kept(model, **inputs) and found.total == plan(model, batch=2, length=length).total
        if method is not None:
            effzoo.detach(model, method)


def test_a_built_model_is_left_alone():
    model = effzoo.build("bert", attention="linformer[k=8]", task="classification", **SIZES).eval()
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.named_parameters()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    plan(model, "lora", batch=2, length=9)
    assert torch.equal(torch.rand(3), expected), "the random state moved"
    assert not model.training
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    for name, tensor in model.named_parameters():
        assert (
            id(tensor) == before[name][0]
            and torch.equal(tensor, before[name][1])
            and tensor.requires_grad
            and tensor.grad is None
        )


def test_adapters_that_are_attached_are_what_is_trained():
    model = effzoo.build("bert", task="classification", peft="lora[rank=4]|bitfit", **SIZES, **TRAINED)
    effzoo.attach(model, "houlsby", name="second")
    effzoo.activate(model, "default", "second")
    found = plan(model, batch=2, length=11)
    assert found.trainable == effzoo.account(model).trainable and found.kept == kept(model, **call(model, 2, 11))
    assert {cause for cause in found.activations if "adapter" in cause}
    effzoo.activate(model)
    assert plan(model, batch=2, length=11).kept == 0, "nothing is trained, so nothing is kept"


@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "efficient"])
def test_on_cuda_no_more_is_kept_than_on_the_cpu(backend):
    """Padding and attention dropout included: within 1.05 of it, where weights written out would be many times as
    much."""
    sizes = {
        "dim": 64,
        "heads": 4,
        "layers": 2,
        "mlp": 256,
        "vocab": 53,
        "max_length": 512,
        "task": "classification",
        **TRAINED,
    }
    bert = effzoo.build("bert", **sizes)
    longformer = effzoo.build("longformer", attention="longformer[window=64]", peft="lora", **sizes)
    for model, length, recompute in ((bert, 256, None), (longformer, 512, "hidden")):
        inputs = call(model, 2, length, padded=True)
        if model is longformer:
            inputs["global_attention_mask"] = (torch.arange(length) == 0).long().expand(2, -1).contiguous()
        cpu = plan(model, inputs=inputs, recompute=recompute)
        cuda = plan(model, inputs=inputs, recompute=recompute, backend=backend, device="cuda")
        assert 0 < cuda.kept <= 1.05 * cpu.kept and cuda.title == f"{cpu.title}, cuda"
    plain = plan(bert, inputs=call(bert, 2, 256, padded=True), backend="reference", device="cuda").kept
    assert plain > 3 * plan(bert, inputs=call(bert, 2, 256, padded=True), device="cuda").kept


def test_fused_dropout_keeps_a_byte_for_each_number():
    cpu, cuda = (
        plan("bert", batch=2, length=37, device=device, dropout=0.1, attention_dropout=0.0, **SIZES)
        for device in ("cpu", "cuda")
    )
    cpu_bytes, cuda_bytes = (found.activations["dropout masks"] for found in (cpu, cuda))
    assert cpu_bytes == 4 * cuda_bytes > 0


@pytest.mark.slow
def test_global_tokens_of_a_real_call_count():
    model = effzoo.build("longformer", attention="longformer[window=8]", task="classification", **SIZES, **TRAINED)
    inputs = call(model, 2, 37, padded=True)
    sizes = []
    for globals_ in (1, 5):
        inputs["global_attention_mask"] = (torch.arange(37) < globals_).long().expand(2, -1).contiguous()
        sizes.append(plan(model, inputs=inputs).kept)
        assert sizes[-1] == kept(model, **inputs)
    assert sizes[0] < sizes[1]


class Indexed(nn.Module):
    """Not of the zoo: writes into a tensor, selects by a mask of the inputs, and keeps what two operations share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        table = torch.zeros(3, 8)
        table[1] = y[chosen].sum(0)
        return (table.exp() * y.sigmoid()[:3]).sum() if bool(chosen.any()) else y.sum()


def test_any_module_is_planned_from_its_inputs():
    model, x = Indexed(), torch.randn(9, 8)
    for chosen in (torch.arange(9) < 4, torch.zeros(9, dtype=torch.bool)):
        assert plan(model, inputs={"x": x, "chosen": chosen}).kept == kept(model, x=x, chosen=chosen)


class Discards(nn.Module):
    """Throws a result and its graph away before it returns."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner, self.times = nn.Linear(8, 8), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            self.inner(x).exp().sigmoid()
        return self.inner(x).exp()


def test_what_the_forward_pass_throws_away_is_not_kept():
    none, some = (plan(Discards(times), inputs={"x": torch.randn(9, 8)}) for times in (0, 3))
    assert none.kept == some.kept > 0


def test_a_tensor_that_loses_its_values_is_metered_once():
    """Small tensors are real until something without a value is written into them; then a fake one stands for them."""
    shadows = Shadows()
    weight = shadows.stand_in(torch.randn(8, 8))
    shadows.live_bytes = meter = LiveBytes()
    with shadows:
        table = torch.zeros(8, 8)
        table += weight
        view = table[:4]
        assert meter.live == meter.peak == table.untyped_storage().nbytes() == 256
        del table, view
    assert meter.live == 0


class OneOfTwo(nn.Module):
    """Draws which path it takes, as mixtures of adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.paths[int(torch.randint(2, ()))](x).exp()


def test_a_path_drawn_at_random_is_drawn():
    model, x = OneOfTwo(), torch.randn(9, 8)
    before = torch.get_rng_state()
    assert plan(model, inputs={"x": x}).kept == kept(model, x=x)
    torch.set_rng_state(before)
    plan(model, inputs={"x": x})
    assert torch.equal(torch.get_rng_state(), before)


class ByValue(nn.Module):
    """Branches on an activation, also where it was written into a tensor that had a value before."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.inner, self.written = nn.Linear(8, 8), written

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(x)
        count = torch.zeros((), dtype=torch.long)
        count += (y > 0).sum()
        return y * 2 if int(count if self.written else (y > 0).sum()) else y


@pytest.mark.parametrize("written", [False, True])
def test_a_branch_on_an_activation_is_refused_and_not_guessed(written):
    with pytest.raises(IncompatibleError, match="cannot be planned: ByValue decides by the values of activations"):
        plan(ByValue(written), inputs={"x": torch.randn(2, 8)})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("momentum", lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9)),
        ("adafactor", torch.optim.Adafactor),
    ],
)
@pytest.mark.parametrize("method", [None, "lora"])
def test_optimizer_states_are_those_of_torch(optimizer, make, method):
    """After one step; scalars, which count steps, left out. An adapter that gets no gradient has no states, so every
    part is used here."""
    model = effzoo.build("bert", task="classification", peft=method, **SIZES)
    stepper = make([p for p in model.parameters() if p.requires_grad])
    model(**call(model, 2, 9)).loss.backward()
    stepper.step()
    states = [x for state in stepper.state.values() for x in state.values() if isinstance(x, torch.Tensor) and x.ndim]
    assert plan(model, batch=2, length=9, optimizer=optimizer).optimizer == sum(
        x.numel() * x.element_size() for x in states
    )


QUANTISED = {  # bytes of both moments, read off tensors of torchao 0.18, and of bitsandbytes 0.50 without its tables
    "adamw_8bit_torchao": (10368, 10368, 32760, 33024, 33792, 280, 54048, 27008, 4096, 12448),
    "adamw_4bit_torchao": (4480, 4480, 32760, 33024, 4616, 280, 27328, 13184, 4096, 5568),
    "adamw_8bit": (8320, 8320, 32760, 8392, 8584, 280, 52000),
    "adamw_8bit_paged": (8320, 8320, 32760, 8392, 8584, 280, 52000),
}


@pytest.mark.parametrize("optimizer", QUANTISED)
def test_quantised_states_are_those_of_their_libraries(optimizer):
    shapes = [(64, 64), (4096,), (4095,), (32, 129), (128, 33), (5, 7), (100, 256), (96, 128), (512,), (2, 4, 640)]
    found = [STATES[optimizer](shape, 4) for shape in shapes[: len(QUANTISED[optimizer])]]
    assert found == list(QUANTISED[optimizer])
    small = [STATES[optimizer](shape, 2) for shape in ((4095,), (5, 7), (64, 64))]
    halves = (16380, 140) if "torchao" in optimizer else (32760, 280)  # bitsandbytes keeps float32 in any case
    assert small == [*halves, QUANTISED[optimizer][0]]


def test_a_plan_knows_every_optimizer_of_finetune_by_name():
    assert OPTIMIZERS.keys() <= STATES.keys()
    model = effzoo.build("bert", task="classification", **SIZES | {"dim": 64})
    bytes_of = {name: plan(model, batch=2, length=9, optimizer=name).optimizer for name in OPTIMIZERS}
    shapes = [(tuple(p.shape), 4) for p in model.parameters()]
    for name, found in bytes_of.items():
        tables = 2048 if name in ("adamw_8bit", "adamw_8bit_paged") else 0  # of bitsandbytes, once
        assert found == sum(STATES[name](*given) for given in shapes) + tables
    assert bytes_of["adamw_4bit_torchao"] < bytes_of["adamw_8bit_torchao"] < bytes_of["adamw"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "lsh[chunk=32]", "linformer[k=32]"])
@pytest.mark.parametrize(("method", "again"), [(None, False), ("lora", True)])
def test_the_peak_is_that_of_the_allocator(attention, method, again):
    """Within 3 %: kernels allocate a little inside, which a plan does not see."""
    sizes = SIZES | {"dim": 64, "mlp": 256, "layers": 3, "max_length": 300}
    model = effzoo.build("bert", attention=attention, peft=method, task="classification", **sizes, **TRAINED).train()
    found = plan(model, batch=2, length=257, checkpointing=again)
    if again:
        model.gradient_checkpointing_enable()
    inputs = call(model, 2, 257)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(**inputs).loss.backward()
    live = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    assert found.peak - found.weights - found.optimizer == pytest.approx(peak, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "name", "replacement"),
    [
        ("effzoo.plans.saved", "key", id),  # views of one storage would count again
        # a view would count for less than it keeps alive
        ("effzoo.plans.saved", "size", lambda tensor: tensor.numel() * tensor.element_size()),
        ("effzoo.plans.shadow", "KNOWN_BYTES", 0),  # nothing would be known of the inputs
    ],
)
def test_a_broken_rule_is_seen(monkeypatch, broken, name, replacement):
    model = effzoo.build("bert", attention="longformer[window=8]", task="classification", **SIZES, **TRAINED)
    inputs = call(model, 2, 37, padded=True)
    real = kept(model, **inputs)
    assert plan(model, inputs=inputs).kept == real
    monkeypatch.setattr(importlib.import_module(broken), name, replacement)
    try:
        assert plan(model, inputs=inputs).kept != real
    except IncompatibleError as error:
        assert name == "KNOWN_BYTES" and "decides by the values" in str(error)


def test_every_byte_has_a_cause():
    found = plan(
        "bert", "lora[dropout=0.1]|prefix", batch=2, length=37, task="token_classification", **SIZES, **TRAINED
    )
    assert sum(found.activations.values()) == found.kept == sum(saved.bytes for saved in found.saved)
    expected = {"adapter lora", "adapter lora dropout masks", "dropout masks", "mlp activation", "attn.norm", "loss"}
    assert expected <= {part for cause in found.activations for part in cause.split(" + ")}
    assert all(saved.path.startswith("blocks.") for saved in found.saved if saved.cause == "mlp activation")
    assert not any("attn core dropout" in cause for cause in found.activations), (
        "which weights are dropped is drawn again"
    )


@pytest.mark.slow
def test_frozen_layers_below_the_first_trained_one_keep_nothing():
    """And a frozen linear keeps no input: LoRA on the last layer of four keeps what this layer needs (Liao et al. 2023,
    section 2)."""
    every, last = (
        plan("bert", f"lora[layers={layers}]", batch=2, length=37, **SIZES | {"layers": 4}, **TRAINED)
        for layers in ("(0,1,2,3)", "3")
    )
    assert {saved.path.split(".")[1] for saved in last.saved if saved.path.startswith("blocks.")} == {"3"}
    assert last.kept < every.kept / 3
    assert not any(part in cause for cause in every.activations for part in ("attn.k", "mlp.up", "attn.o"))


@pytest.mark.slow
def test_a_model_of_three_billion_parameters_takes_no_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan(
        "llama",
        "lora",
        batch=4,
        length=2048,
        dim=3072,
        layers=28,
        heads=24,
        kv_heads=8,
        head_dim=128,
        mlp=8192,
        precision="master",
    )
    assert found.parameters - found.trainable == 3_212_749_824, "Llama 3.2 3B as published"
    assert found.weights > 6e9 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024


def test_the_table_reads_as_it_is():
    found = plan("bert", "lora", batch=2, length=37, **SIZES)
    lines = str(found).splitlines()
    assert lines[0] == "bert, lora, 2 x 37, float32, adamw"
    rows = {line[:-21].strip(): float(line.split()[-1]) for line in lines[4:]}
    assert rows["total"] == 100.0 and sum(rows[name] for name in found.parts() if name in rows) == pytest.approx(
        100, abs=0.3
    )
    assert sum(nbytes for name, nbytes in found.lines(smallest=0.05) if name.startswith("  ")) == found.kept
    with pytest.raises(OptionError, match=r"plan\.lines\(\) now"):
        found.rows()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        (("bert",), {"length": 9, "optimizer": "adamv"}, r"unknown optimizer 'adamv'; did you mean '(adamw|adam)'"),
        (("bert",), {"length": 9, "precision": "autocst"}, "unknown precision 'autocst'; did you mean 'autocast'"),
        (
            ("bert",),
            {"length": 9, "precision": "master", "dtype": "float32"},
            "precision 'master' is for bfloat16 and float16, got torch.float32",
        ),
        (("bert",), {"length": 9, "device": "gpu"}, "plan knows the devices 'cpu' and 'cuda', got 'gpu'"),
        (
            ("bert",),
            {"length": 9, "device": "cuda", "precision": "autocast"},
            "autocast on CUDA computes other operations in float32",
        ),
        (("bert",), {"length": 9, "backend": "sdpa"}, "backend 'sdpa' is not one of auto, reference, flash"),
        (
            ("bert",),
            {"length": 9, "backend": "efficient"},
            "backend 'efficient' cannot run here: it runs on cuda, the tensors are on cpu",
        ),
        (
            ("bert",),
            {"length": 9, "dtype": "int8"},
            "dtype is a floating-point type such as torch.bfloat16 or 'float32', got 'int8'",
        ),
        (("bert",), {}, "plan needs the length of the sequences, such as length=512"),
        (("bert",), {"length": 0}, "length is at least 1, got 0"),
        (
            ("bert",),
            {"length": 97, **SIZES},
            "97 tokens do not fit into max_length 96; truncate to 96, or build the model with max_length=97",
        ),
        (
            ("bert", "prompt[length=10]"),
            {"length": 90, **SIZES},
            "90 tokens and 10 prompt tokens do not fit into max_length 96",
        ),
        (("bert",), {"length": 9, "inputs": {}}, "give length"),
        (("perceiver",), {"length": 9}, "perceiver reads a grid of 224 x 224, which is length=50176, got length=9"),
        ((nn.Linear(2, 2),), {"length": 9}, "Linear is no model of effzoo, so its inputs are not known"),
        (
            (nn.Linear(2, 2),),
            {"inputs": {}, "layers": 3},
            "a built model has its sizes already, so layers mean nothing",
        ),
        ((nn.Linear(2, 2),), {"inputs": {}, "checkpointing": True}, "Linear has no gradient checkpointing"),
        ((3,), {"length": 9}, "model takes a model or str, got 3"),
        (("bret",), {"length": 9}, "did you mean 'bert'"),
        (("bert", "lroa"), {"length": 9}, "did you mean 'lora'"),
    ],
)
def test_what_cannot_be_planned_is_said(arguments, options, said):
    with pytest.raises(EffzooError, match=said):
        plan(*arguments, **options)


def test_a_method_that_computes_with_weights_when_it_is_made_is_refused():
    with effzoo.scope():

        @effzoo.peft.register("by_value")
        class ByWeight(effzoo.peft.get("lora")):
            def make(self, site):
                self.scale = float(site.weight.sum())
                return super().make(site)

        with pytest.raises(
            IncompatibleError,
            match="'by_value' computes with the values of weights when it is made .*; make it for real",
        ):
            plan("bert", "by_value", length=9, **SIZES)
        model = effzoo.build("bert", peft="by_value", **SIZES)
        assert plan(model, length=9).kept > 0


def test_the_lectures_table_of_opt_by_its_own_formulas():
    """At 512 positions 2.6, 2.6 and 1 GB come out, for N = 1,315,758,080; 8 N and 4 N are the last two, exchanged."""
    count = 1_315_758_080
    hidden = 2 * lecture_activations(layers=24, dim=2048, length=512)
    sizes = dict(zip(OPT_SLIDE, (2 * count, 2 * count, hidden, 8 * count, 4 * count), strict=True))
    off = {part: sizes[part] / 1e9 - float(said.split()[0]) for part, said in OPT_SLIDE.items()}
    assert all(abs(off[part]) < 0.05 for part in list(off)[:3])
    assert off["optimizer states"] == pytest.approx(10.5 - 5.2, abs=0.05)
    assert off["float32 copy"] == pytest.approx(5.3 - 10.2, abs=0.05)
    assert "10.5 GB" in OPT_SLIDE_REMARK and "5.3 GB" in OPT_SLIDE_REMARK


@pytest.mark.slow
def test_the_table_of_opt():
    """1,315,758,080 parameters as published; 2, 2, 8 and 4 bytes of each; and LoRA on queries and values, 2 x 24 x 8 x
    (2048 + 2048)."""
    table = opt_table(length=64)
    full, lora = table.columns.values()
    assert table.plans["full"].trainable == 1_315_758_080 and table.plans["lora[rank=8]"].trainable == 1_572_864
    names = ("weights", "gradients of trainable parameters", "optimizer states", "float32 copy")
    assert [full[name] for name in names] == [factor * 1_315_758_080 for factor in (2, 2, 8, 4)]
    assert [lora[name] for name in names[1:]] == [factor * 1_572_864 for factor in (2, 8, 4)]
    assert lora["hidden states, planned, fused attention"] < full["hidden states, planned, fused attention"]
    assert full["hidden states, planned, fused attention"] < full["hidden states, planned, weights written out"]
    assert all(name in str(table) for name in (*names, "OPT-1.3B, 1 x 64, float16"))


def test_a_plan_has_the_dtype_of_adapters_that_is_asked_for(tiny):
    half, full = (
        plan("bert", "lora", batch=2, length=8, dtype="float16", **held, **tiny)
        for held in ({"adapter_dtype": "float16"}, {})
    )
    assert 2 * half.gradients == full.gradients and half.trainable == full.trainable
    for make in (effzoo.build, lambda name, **sizes: plan(name, batch=2, length=8, **sizes)):
        with pytest.raises(
            OptionError, match="adapter_dtype='float16' is the dtype of an adapter, and peft names none"
        ):
            make("bert", adapter_dtype="float16", **tiny)


def test_the_formula_of_the_lectures():
    """L (20 h s + 3 s^2), worked for OPT-1.3B: 24 (20 x 2048 x 2048 + 3 x 2048^2) = 24 x 23 x 2^22."""
    assert lecture_activations(layers=24, dim=2048, length=2048) == 24 * 23 * 2**22
    assert lecture_activations(layers=1, dim=8, length=4, batch=3, heads=2) == 3 * (20 * 32 + 3 * 2 * 16)
    with pytest.raises(EffzooError, match="length is at least 1, got 0"):
        lecture_activations(layers=1, dim=8, length=0)


@pytest.mark.slow
def test_the_command_prints_the_plan():
    importlib.import_module("effzoo.cli.plan")
    arguments = ["plan", "bert", "--length", "128", "--batch", "2", "--peft", "lora", "--precision", "autocast"]
    result = CliRunner().invoke(app, arguments)
    found = plan("bert", "lora", batch=2, length=128, precision="autocast")
    assert result.exit_code == 0 and found.title in result.output
    assert f"{found.kept / 2**20:,.2f}" in result.output and "half copies of weights" in result.output
    refused = CliRunner().invoke(app, ["plan", "bert", "--length", "513"])
    assert refused.exit_code == 2 and "513 tokens do not fit into max_length 512" in refused.stderr
    longer = CliRunner().invoke(
        app, ["plan", "bert", "--length", "513", "--max-length", "600", "--attention", "longformer[window=64]"]
    )
    assert longer.exit_code == 0, longer.output


SPREAD = [  # name, options, spec: of the attention of each layer
    ("longformer", "longformer[window=8]", "lora"), ("bert", "linformer[k=8]", "lora"), ("bert", "perceiver", "prefix"),
    ("gpt2", "full", "lora"), ("bert", "blockwise[blocks=3]", "houlsby"), ("gpt2", "local[chunk=8]", "lora"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "attention", "method"), SPREAD)
def test_a_rank_keeps_what_is_planned(name, attention, method):
    """Activations of the rank in the middle of three, as `OverRanks` runs there, with what others would send."""
    task = task_of(name)
    model = effzoo.build(name, attention=attention, task=task, peft=method, **SIZES, **TRAINED)
    over = OverRanks(model, Planned(3, 1))
    found = plan(model, batch=2, length=37, ranks=3)
    with counted() as traffic:
        assert found.kept == kept(model, call=over, **call(model, 2, 37)) > 0
    whole = plan(model, batch=2, length=37)
    assert found.kept < whole.kept and found.spread.ranks == 3 and whole.spread is None
    assert found.spread.sent > 0 and sum(traffic.sent.values()) > 0


def test_seconds_of_ranks_are_bytes_over_the_link_and_operations_over_the_rate():
    made = plan("bert", "lora", length=48, ranks=4, link=1e6, rate=1e9, **SIZES).spread
    layers = [max(layer.sent / 1e6, layer.operations / 1e9) for layer in made.layers]
    assert made.seconds == pytest.approx(sum(layers) + made.products / 1e9 + made.gradients / 1e6)
    assert made.link_seconds == made.sent / 1e6 and made.compute_seconds == made.operations / 1e9
    windows = plan("bert", attention="longformer[window=4]", length=48, ranks=4, link=1e6, rate=1e9, **SIZES).spread
    assert windows.seconds == pytest.approx(windows.link_seconds + windows.compute_seconds)
    for given, missing in (({"link": 1.0}, "rate"), ({"rate": 1.0}, "link")):
        with pytest.raises(InputError, match=f"seconds need the {missing}: plan"):
            _ = plan("bert", length=48, ranks=2, **given, **SIZES).spread.seconds


def test_operations_of_ranks_are_those_of_one_process():
    """Products with weights exactly; of a window all but what the ends of the sequence cut off."""
    model = effzoo.build("gpt2", task="causal_lm", **SIZES)
    one, four = (spread(model, length=48, ranks=ranks) for ranks in (1, 4))
    assert one.products == 4 * four.products and one.layers[0].operations == 4 * four.layers[0].operations
    matrices = sum(part.weight.numel() for part in model.modules() if isinstance(part, effzoo.sites.Linear))
    assert one.products == 6 * 48 * matrices and one.sent == 0
