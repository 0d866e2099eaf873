"""Every public function refuses what its annotations do not say, with a sentence; a new one is walked by itself."""

import copy
import importlib
import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import effzoo
from effzoo.annotations import check_arguments, checked
from effzoo.errors import ArgumentError, EffzooError, InputError, OptionError

MODULES = (
    "effzoo",
    "effzoo.peft",
    "effzoo.attention",
    "effzoo.routing",
    "effzoo.convert",
    "effzoo.data",
    "effzoo.checks",
    "effzoo.course",
    "effzoo.train",
)
FUNCTIONS = {
    f"{path}.{name}": getattr(module, name)
    for path, module in ((path, importlib.import_module(path)) for path in MODULES)
    for name in module.__all__
    if inspect.isroutine(getattr(module, name))
}
WRONG = (None, 3, -1, 2.5, float("nan"), "x", b"", object(), [], {}, (None,), Path("nowhere"), torch.zeros(2))


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Something that fits, by the name of the parameter."""
    sizes = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50, "max_length": 32}
    model = effzoo.build("bert", peft="lora[rank=2]", task="classification", **sizes)
    x = torch.rand(4, 4)
    return {
        "model": model, "peft": "ia3", "name": "default", "names": "lora", "directory": tmp_path_factory.mktemp("out"),
        "folder": tmp_path_factory.mktemp("model"),
        "weights": {"default": 1.0}, "assignment": "a03", "file": "nowhere.py",
        "kind": "attention", "only": (), "path": "nowhere.py", "output_dir": tmp_path_factory.mktemp("run"),
        "train": [], "examples": [],
        "attention": "local", "n": 60, "input_ids": torch.ones(1, 3, dtype=torch.long),
        "stage": effzoo.peft.Stage("x", 1.0), "batches": [],
        "given": "lora", "mixture": "default", "expert": 0, "adapters": ["default"], "progress": 0.5, "total": 10,
        "method": "lora", "trainable": 10**4,
        "allowed": x > 0.5, "dtype": torch.float32, "q": torch.rand(1, 2, 3, 4), "memory": None, "scores": x,
        "clean": x, "noisy": x, "deviation": x,
        "k": 1, "probabilities": x, "chosen": x > 0.5, "routing": None, "source": "nowhere/at/all",
        "config": model.config, "data": [], "tokenizer": None, "tokens": [], "logits": [], "answers": [],
        "max_length": 8, "parts": (0.5, 0.5), "task": "classification",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("path", FUNCTIONS)
def test_a_wrong_argument_is_refused_with_a_sentence(path, arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function = FUNCTIONS[path]
    assert hasattr(function, "checks_arguments"), f"end the module of {path} with check_arguments(globals())"
    parameters = inspect.signature(function).parameters.values()
    for asked in parameters:
        if asked.kind is asked.VAR_KEYWORD:
            continue
        for wrong in WRONG:
            given = {
                p.name: arguments[p.name]
                for p in parameters
                if p.default is p.empty and p.name in arguments and p is not asked
            }
            given = {key: copy.deepcopy(value) if key == "model" else value for key, value in given.items()}
            by_place = [
                *(given.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name in given)
            ]
            if asked.kind is asked.VAR_POSITIONAL:
                by_place = [*by_place, wrong]
            elif asked.default is asked.empty and asked.kind is asked.POSITIONAL_OR_KEYWORD:
                by_place = []
                given = {
                    **{
                        p.name: arguments.get(p.name)
                        for p in parameters
                        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
                    },
                    **given,
                }
                given[asked.name] = wrong
            else:
                given[asked.name] = wrong
            given.pop("names", None)
            try:
                result = function(*by_place, **given)
                if inspect.isgenerator(result):
                    next(result, None)
            except EffzooError as error:
                assert len(str(error).split()) > 2
            except Exception as error:
                raise AssertionError(
                    f"{path}({asked.name}={wrong!r}) raised {type(error).__name__}: {error}"
                ) from error


def test_a_function_that_is_exported_later_is_checked_too():
    def made(model: torch.nn.Module, size: "int | None" = None, *names: str) -> str:
        return f"{size} {names}"

    module = {"made": made, "__all__": ["made"]}
    check_arguments(module)
    check_arguments(module)  # twice is once
    assert module["made"](torch.nn.ReLU(), 3, "a") == "3 ('a',)" and checked(module["made"]) is module["made"]
    for given in (("x",), (torch.nn.ReLU(), "3"), (torch.nn.ReLU(), True), (torch.nn.ReLU(), 3, "a", 4)):
        with pytest.raises(ArgumentError, match="made: (model|size|names) takes"):
            module["made"](*given)
    with pytest.raises(OptionError, match="made: size is a number of at most 63 bits, got 9"):
        module["made"](torch.nn.ReLU(), size=9 * 10**30)


SIZES = {"layers": 1, "dim": 16, "heads": 2, "mlp": 32, "vocab": 50, "max_length": 32}
IDS = torch.ones(2, 4, dtype=torch.long)
INPUTS = [
    {"input_ids": [[1, 2]]}, {"input_ids": IDS.float()}, {"input_ids": -IDS}, {"input_ids": IDS + 49},
    {"input_ids": IDS[0]}, {"input_ids": IDS[:0]},
    {"input_ids": IDS[:, :0]}, {"input_ids": IDS[None]}, {"input_ids": "x"}, {"input_ids": None},
    {"input_ids": IDS.repeat(1, 9)}, {"input_ids": IDS.bool()},
    {"attention_mask": [[1, 1]]}, {"attention_mask": IDS[:1]}, {"attention_mask": 2 * IDS},
    {"attention_mask": IDS * float("nan")},
    {"position_ids": IDS.float()}, {"position_ids": -IDS}, {"inputs_embeds": torch.zeros(2, 4, 16)},
    {"input_ids": None, "inputs_embeds": [1.0]},
    {"input_ids": None, "inputs_embeds": torch.zeros(2, 4, 15)},
    {"input_ids": None, "inputs_embeds": torch.zeros(0, 4, 16)},
]  # fmt: skip
LABELS = {
    "classification": [torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.zeros(2, 2, 2),
    torch.tensor([[float("nan"), 1.0]] * 2), [0, 1], IDS,
                       torch.tensor([[-3.0, 7.0]] * 2), torch.tensor([[float("inf"), 0.0]] * 2),
                       torch.zeros(2).cfloat(), torch.zeros(3).long()],
    "causal_lm": [torch.zeros(2).long(), IDS.float(), IDS + 49, IDS[:1], IDS[:, :3], torch.zeros(2, 4, 50),
    torch.tensor(0), "x", IDS.to("meta")],
    "token_classification": [torch.zeros(2).long(), IDS.float(), IDS + 1, IDS[:, :3], 3],
}  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "gpt2", "perceiver-io"])
def test_inputs_that_do_not_fit_are_refused_with_a_sentence(name):
    more = {
        "channels": 16,
        "latents": 4,
        "decoder_head_dim": 8,
        "head_dim": 8,
        "cross_head_dim": 8,
        "value_dim": 8,
        "cross_value_dim": 8,
    }
    more |= {"cross_heads": 2, "decoder_value_dim": 8, "query_dim": 16}
    model = effzoo.build(name, **SIZES, **(more if name == "perceiver-io" else {}))
    for given in INPUTS:
        with pytest.raises(InputError):
            model(**{"input_ids": IDS, **given})


@pytest.mark.parametrize("task", LABELS)
def test_labels_that_do_not_fit_are_refused_with_a_sentence(task):
    model = effzoo.build("gpt2" if task == "causal_lm" else "bert", **SIZES, task=task)
    for labels in LABELS[task]:
        with pytest.raises(InputError, match="labels"):
            model(input_ids=IDS, labels=labels)
    single = effzoo.build("bert", **SIZES, task="classification", num_labels=1)
    with pytest.raises(InputError, match="finite numbers, got nan"):
        single(input_ids=IDS, labels=torch.tensor([0.5, float("nan")]))
    assert single(input_ids=IDS, labels=torch.tensor([-3.0, 7.0])).loss.isfinite()


@pytest.mark.parametrize("path", [path for path in FUNCTIONS if not inspect.ismethod(inspect.unwrap(FUNCTIONS[path]))])
def test_a_public_function_is_pickled_so_that_other_processes_can_call_it(path):
    assert pickle.loads(pickle.dumps(FUNCTIONS[path])) is FUNCTIONS[path]


def test_numbers_of_numpy_are_those_of_python_wherever_they_are_given():
    model = effzoo.build("bert", peft="lora", layers=1, dim=16, heads=2, mlp=32, vocab=50, max_length=32)
    for scale in (np.float32(0.5), {"default": np.float16(0.5)}):
        effzoo.activate(model, "default", scale=scale)
        assert effzoo.status(model).scales == {"default": 0.5}
    with effzoo.active(model, "default", scale=np.float32(0.25)):
        assert effzoo.status(model).scales == {"default": 0.25}


@pytest.mark.parametrize("function", [effzoo.attach, effzoo.account, effzoo.merge])
def test_a_model_is_called_a_model(function):
    with pytest.raises(ArgumentError, match="model takes a model, got 'bert' \\(str\\)"):
        function("bert", "lora") if function is not effzoo.account else function("bert")


ODD_DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.float32,
    torch.float16,
    torch.complex64,
)


@pytest.mark.parametrize("name", ["bert", "gpt2", "longformer"])
@pytest.mark.parametrize("dtype", ODD_DTYPES, ids=str)
def test_ids_of_another_dtype_than_torch_looks_rows_up_with_are_refused(name, dtype):
    model = effzoo.build(name, **SIZES)
    model.eval()
    assert torch.equal(model(input_ids=IDS.int()).last_hidden_state, model(input_ids=IDS).last_hidden_state)
    for given in ({"input_ids": IDS}, {"position_ids": 0 * IDS}, {"token_type_ids": 0 * IDS}, {"task_ids": IDS[:, 0]}):
        ((key, ids),) = given.items()
        with pytest.raises(
            InputError,
            match=rf"{key} is an integer tensor, got {dtype} of shape .+; int64 and int32 are read, as .long\(\)",
        ):
            model(**{"input_ids": IDS, key: ids.to(dtype)})


@pytest.mark.parametrize("dtype", [*ODD_DTYPES, torch.float8_e4m3fn, torch.int32, torch.bfloat16], ids=str)
def test_a_mask_of_any_dtype_is_the_same_mask_or_refused(dtype):
    model = effzoo.build("longformer", **SIZES).eval()
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    for key in ("attention_mask", "global_attention_mask"):
        if dtype in (torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.float8_e4m3fn):
            for given in (mask, 2 * mask):
                with pytest.raises(
                    InputError, match=f"{key} holds 0 and 1 as booleans, integers or floats, got {dtype}; .bool"
                ):
                    model(input_ids=IDS, **{key: given.to(dtype)})
        else:
            right = model(input_ids=IDS, **{key: mask}).last_hidden_state
            assert torch.equal(model(input_ids=IDS, **{key: mask.to(dtype)}).last_hidden_state, right)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("task", ["classification", "token_classification", "causal_lm", "masked_lm"])
def test_small_integers_are_labels_as_they_are(dtype, task):
    """156 in uint8 is no -100, and 300 classes are more than int8 counts to."""
    torch.manual_seed(0)
    model = effzoo.build(
        "gpt2" if task == "causal_lm" else "bert", **{**SIZES, "vocab": 300}, task=task, num_labels=300
    ).eval()
    labels = torch.tensor([[3, 100, 127, 5], [0, 99, 1, 2]])
    labels = labels if dtype != torch.uint8 else torch.tensor([[156, 200, 156, 5], [0, 255, 1, 156]])
    labels = labels[:, 0] if task == "classification" else labels
    outputs = {kind: model(input_ids=IDS, labels=labels.to(kind)) for kind in (torch.int64, dtype)}
    assert torch.equal(outputs[dtype].loss, outputs[torch.int64].loss)
    logits = outputs[dtype].logits.double()
    logits, wanted = (logits[:, :-1], labels[:, 1:]) if task == "causal_lm" else (logits, labels)
    torch.testing.assert_close(
        outputs[dtype].loss.double(), -logits.log_softmax(-1).gather(-1, wanted[..., None]).mean(), atol=1e-6, rtol=1e-6
    )


def test_labels_beyond_the_classes_are_told_in_every_dtype():
    model = effzoo.build("bert", **SIZES, task="classification", num_labels=3)
    with pytest.raises(InputError, match=r"labels are in \[0, 3\) or -100, got 1 to 156"):
        model(input_ids=IDS, labels=torch.tensor([156, 1], dtype=torch.uint8))
    for dtype in (torch.uint16, torch.uint64, torch.complex64):
        with pytest.raises(InputError, match=f"labels are integers .+ got {dtype}"):
            model(input_ids=IDS, labels=torch.tensor([2, 1]).to(dtype))
    assert torch.equal(
        *(
            model.eval()(input_ids=IDS, labels=labels).loss
            for labels in (torch.tensor([True, False]), torch.tensor([1, 0]))
        )
    )


@pytest.mark.parametrize("key", ["input_ids", "attention_mask", "labels"])
def test_tensors_that_are_not_dense_or_on_another_device_are_refused_with_a_sentence(key):
    model = effzoo.build("gpt2", **SIZES, task="causal_lm")
    for odd, said in (
        (IDS.to_sparse(), "got a sparse_coo one"),
        (torch.nested.nested_tensor([IDS[0], IDS[0, :2]]), "got a nested one"),
    ):
        with pytest.raises(InputError, match=f"{key} is a dense tensor, {said}"):
            model(**{"input_ids": IDS, key: odd})
    with pytest.raises(InputError, match="on meta"):
        model(
            **{
                "input_ids": IDS,
                "attention_mask": IDS,
                key: IDS.to("meta"),
                **({} if key == "labels" else {"labels": IDS}),
            }
        )
    with pytest.raises(InputError, match="cache is an effzoo.attention.Cache, got list"):
        model(input_ids=IDS, cache=[])


def test_what_is_wrong_inside_a_map_or_list_is_named():
    model = effzoo.build("bert", peft="lora", **SIZES)
    for call, said in (
        (lambda: effzoo.combine(model, {0: 1.0}, name="c"), "its key 0 is of type int"),
        (lambda: effzoo.combine(model, {"default": True}, name="c"), r"its 'default' is True \(bool\)"),
        (lambda: effzoo.activate(model, "default", scale={None: 1.0}), "its key None is of type NoneType"),
        (lambda: effzoo.activate(model, rows=["default", 1]), r"item 1 is 1 \(int\)"),
        (
            lambda: effzoo.activate(model, rows=np.array(["default"])),
            r"a list of \(str or none\) or none, .+; .tolist\(\) makes a list of it",
        ),
        (lambda: effzoo.activate(model, rows=torch.tensor([0])), r"\(Tensor\); .tolist\(\) makes a list of it"),
        (
            lambda: effzoo.activate(model, rows=(name for name in ["default"])),
            r"\(generator\); list\(...\) makes one of it",
        ),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()
    effzoo.activate(model, rows=("default", None, "default"))
    with pytest.raises(
        EffzooError,
        match=r"adapters were chosen for 3 rows, but what comes here has 2 rows, shape "
        r"\(2, 4, 16\); give as many choices",
    ):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    "build", [effzoo.build, lambda name, **sizes: effzoo.plan(name, batch=1, length=4, **sizes)], ids=["build", "plan"]
)
def test_a_spec_by_layers_says_how_layers_are_written(build):
    for given, said in (
        ({"attention": {0: "full"}}, r"the keys of a spec mapping are texts.+got the key 0 \(int\)"),
        ({"attention": {"0": "full", "1": "local"}}, "got 2: .+ a list with one spec for each layer"),
        ({"attention": {"0": "full"}}, "has no option 'layers'.+ a list with one spec for each layer"),
        (
            {"peft": {0: "lora"}},
            r"the keys of a spec mapping are texts.+layers \(\{'0-3': 'lora'\}\), got the key 0 \(int\)",
        ),
        ({"peft": {"name": "lora", None: 3}}, r"got the key None \(NoneType\)"),
        ({"peft": {"name": "lora", "rank": {0: 1}}}, "its key 0 is of type int"),
    ):
        with pytest.raises(EffzooError, match=said):
            build("bert", **SIZES, **given)
