"""A folder of effzoo opens in transformers, and a model of effzoo is a model of transformers, with equal outputs."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from support import sizes_of, small
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
)

import effzoo
import effzoo.transformers
from effzoo.errors import FileError, IncompatibleError, InputError, OptionError
from effzoo.sites import unwrap
from effzoo.transformers import EffzooConfig, wrap

AUTO = {
    "features": AutoModel, "classification": AutoModelForSequenceClassification,
    "token_classification": AutoModelForTokenClassification, "question_answering": AutoModelForQuestionAnswering,
    "masked_lm": AutoModelForMaskedLM, "causal_lm": AutoModelForCausalLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}  # fmt: skip
SMALL = {"layers": 2, "dim": 32, "heads": 4, "mlp": 48, "vocab": 60, "max_length": 64}


def built(task="classification", name=None, **more):
    torch.manual_seed(0)
    name = name or {"causal_lm": "gpt2", "seq2seq_lm": "bart"}.get(task, "bert")
    labels = {"num_labels": 3} if task.endswith("classification") else {}
    model = effzoo.build(name, task=task, **(labels | SMALL | more)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows=2, n=17, seed=1):
    return torch.randint(5, 60, (rows, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def first(model, ids=None):
    ids = tokens() if ids is None else ids
    out = model(ids, decoder_input_ids=ids[:, :5]) if model.config.is_encoder_decoder else model(ids)
    return torch.stack([out.start_logits, out.end_logits], -1) if "start_logits" in out else out[0]


@pytest.mark.parametrize("task", AUTO)
def test_a_folder_opens_with_its_auto_class_and_computes_the_same_to_the_bit(task, tmp_path):
    model = built(task, attention="longformer[window=8]")
    effzoo.save(model, tmp_path)
    again = AUTO[task].from_pretrained(tmp_path)
    assert torch.equal(first(model), first(again)) and not again.training
    more = {"decoder_input_ids": tokens(n=5)} if task == "seq2seq_lm" else {}
    assert torch.equal(again(tokens(), **more, return_dict=False)[0], again(tokens(), **more)[0])
    assert dict(again.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert again.dtype == torch.float32 and again.device.type == "cpu"
    assert again.num_parameters() == sum(p.numel() for p in model.parameters())
    other = AUTO[task].from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert other.dtype == torch.bfloat16 and other.device.type == "cpu"


@pytest.mark.parametrize("task", AUTO)
def test_what_save_pretrained_writes_opens_in_both(task, tmp_path):
    model = wrap(effzoo.attach(built(task), "lora[rank=2]"))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    for again in (AUTO[task].from_pretrained(tmp_path), effzoo.load(tmp_path)):
        assert list(effzoo.attached(again)) == ["default"]
        assert torch.equal(first(model.eval()), first(again))
    state = transformers.modeling_utils.load_state_dict(str(tmp_path / "model.safetensors"))
    assert state.keys() == model.state_dict().keys(), "a Trainer loads all tensors from this file"


@pytest.mark.slow
@pytest.mark.parametrize("name", effzoo.models())
def test_every_model_of_the_zoo_opens(name, tmp_path):
    for task, auto in AUTO.items():
        try:
            model = effzoo.build(name, task=task, **sizes_of(name)).eval()
        except (IncompatibleError, OptionError):
            continue
        effzoo.save(model, tmp_path / task)
        if task == "features" and model.config.is_encoder_decoder:
            with pytest.raises(IncompatibleError, match="reads one text, and an encoder-decoder two"):
                auto.from_pretrained(tmp_path / task)
            continue
        again = auto.from_pretrained(tmp_path / task)
        if model.embeddings.token is not None:
            ids = torch.randint(5, model.config.vocab, (2, 17))
            assert torch.equal(first(model, ids), first(again, ids))
            again.save_pretrained(tmp_path / f"{task}-again")
            assert torch.equal(first(model, ids), first(effzoo.load(tmp_path / f"{task}-again"), ids))


def test_a_changed_or_damaged_folder_is_refused(tmp_path):
    effzoo.save(built(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["eps"] = 0.01
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match="eps is 1e-12 there and 0.01 here"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    effzoo.save(built(), tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.config["eps"] = 0.01
    with pytest.raises(OptionError, match="eps is 1e-12 in .*, and 0.01 in the configuration"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, config=config)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-4] + b"abcd")
    with pytest.raises(FileError, match=r"model\.safetensors"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_tensors_of_adapters_that_are_there_twice_are_compared(tmp_path):
    model = wrap(effzoo.attach(built(), "lora[rank=2]"))
    model.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lora.B"):
                parameter.add_(1)
    model.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "model.safetensors").replace(tmp_path / "one" / "model.safetensors")
    with pytest.raises(FileError, match="files of two models"):
        effzoo.load(tmp_path / "one")


def test_another_head_is_new_and_said(tmp_path, caplog):
    model = built("masked_lm")
    effzoo.save(model, tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True
    )  # fmt: skip
    assert again(tokens()).logits.shape == (2, 5) and again.config.num_labels == 5
    assert "head.out.weight" in info["missing_keys"] and "has to be trained: head.dense.weight" in caplog.text
    caplog.clear()
    effzoo.save(built(), tmp_path, labels=["a", "b", "c"])
    named = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert named.config.id2label == {0: "a", 1: "b", 2: "c"} and not caplog.text
    body = AutoModel.from_pretrained(tmp_path)
    assert "its head is left out" in caplog.text
    assert torch.equal(body(tokens()).last_hidden_state, built()(tokens()).last_hidden_state)
    four = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert four(tokens()).logits.shape == (2, 4) and four.config.id2label[3] == "LABEL_3"
    four.save_pretrained(tmp_path / "four")
    assert effzoo.load(tmp_path / "four").num_labels == 4


def test_answers_have_the_loss_of_transformers():
    mine = built("question_answering").double()
    theirs, outer = effzoo.convert.to_transformers(mine), wrap(mine)
    places = {"start_positions": torch.tensor([2, 16]), "end_positions": torch.tensor([5, 17])}
    both = [model(tokens(), start_positions=places["start_positions"], end_positions=torch.tensor([5, 16])).loss
            for model in (outer, theirs)]  # fmt: skip
    torch.testing.assert_close(both[0].double(), both[1].double(), rtol=0, atol=1e-6)
    out = outer(tokens(), **places)  # one place behind the last token
    logs = [x.log_softmax(-1) for x in (out.start_logits, out.end_logits)]
    torch.testing.assert_close(out.loss, -(logs[0][0, 2] + logs[0][1, 16] + logs[1][0, 5]) / 3)
    with pytest.raises(InputError, match="together"):
        outer(tokens(), start_positions=places["start_positions"])


@pytest.mark.parametrize("task", AUTO)
def test_a_model_of_a_configuration_is_that_of_build(task):
    name = {"causal_lm": "gpt2", "seq2seq_lm": "bart"}.get(task, "bert")
    config = EffzooConfig(name=name, num_labels=3, attention="full", **SMALL)
    torch.manual_seed(3)
    mine = AUTO[task].from_config(config)
    torch.manual_seed(3)
    labels = {"num_labels": 3} if task.endswith("classification") else {}
    theirs = effzoo.build(name, task=task, attention="full", **labels, **SMALL)
    for (key, a), (other, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert key == other and torch.equal(a, b)
    assert mine.config.task == task and mine.config.hidden_size == 32 and mine.config.vocab_size == 60


def test_a_configuration_goes_through_json(tmp_path):
    config = EffzooConfig(name="bert", num_labels=3, attention=["full", "local[chunk=8]"], **SMALL)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.sizes == config.sizes and again.num_labels == 3 and again.to_dict() == config.to_dict()
    assert json.loads(config.to_json_string())["config"]["attention"] == ["full", "local[chunk=8]"]
    assert EffzooConfig().num_hidden_layers == 12
    for wrong, said in (({"layrs": 2}, r"no 'layrs'; did you mean 'layers'"), ({"layers": 0}, "layers is")):
        with pytest.raises(OptionError, match=said):
            EffzooConfig(name="bert", **wrong)
    named = EffzooConfig(name="bert", hidden_size=24, num_attention_heads=2, pad_token_id=3)
    assert (named.sizes.dim, named.sizes.heads, named.sizes.pad_token) == (24, 2, 3)
    with pytest.raises(OptionError, match="hidden_size is a size of the weights"):
        again.hidden_size = 8


REMOTE = """
import sys, torch
from transformers import AutoModelForSequenceClassification
torch.set_num_threads(1)  # as in the tests: with other threads, sums round otherwise
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "effzoo.transformers" in sys.modules
print(model(torch.arange(5, 22)[None]).logits.double().sum().item())
"""


@pytest.mark.slow
def test_a_folder_opens_by_remote_code_where_effzoo_was_not_imported(tmp_path):
    model = built()
    effzoo.save(model, tmp_path / "model")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "model")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == model(torch.arange(5, 22)[None]).logits.double().sum().item()


def test_code_in_a_folder_is_not_run_where_effzoo_was_imported(tmp_path):
    effzoo.save(built(), tmp_path / "model", tokenizer=None)
    trace = tmp_path / "was run"
    (tmp_path / "model" / "modeling_effzoo.py").write_text(f"open({str(trace)!r}, 'w')\nraise SystemExit")
    for given in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", **given)
        assert torch.equal(first(again), first(effzoo.load(tmp_path / "model")))
    transformers.pipeline("text-classification", model=str(tmp_path / "model"), tokenizer=Words())
    assert not trace.exists()


class Words(transformers.PreTrainedTokenizerFast):
    """The shortest tokenizer that a pipeline takes."""

    def __init__(self):
        super().__init__(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))


def test_the_two_share_everything():
    model = built()
    outer = wrap(model)
    assert outer.inner is model and unwrap(outer) is model and wrap(outer) is outer
    assert effzoo.attach(outer, "lora[rank=2]") is outer
    assert dict(outer.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert outer.state_dict().keys() == model.state_dict().keys()
    assert outer.train().training and model.training and model.blocks[0].training
    assert not outer.eval().training and not model.training
    other = copy.deepcopy(outer)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert other.inner is not model and not torch.equal(first(other), first(outer))
    assert next(outer.double().parameters()).dtype == next(model.parameters()).dtype == torch.float64
    assert str(effzoo.account(outer)) == str(effzoo.account(model))
    effzoo.merge(outer)
    assert not effzoo.attached(model) and torch.equal(first(outer), first(model))
    for cls, task in (("EffzooForCausalLM", "causal_lm"), ("EffzooModel", "features")):
        assert type(wrap(built(task))).__name__ == cls
    with pytest.raises(IncompatibleError, match="wrap takes a model of effzoo, got Linear"):
        wrap(torch.nn.Linear(2, 2))
    with pytest.raises(IncompatibleError, match="EffzooModel computes the task 'features', and the model 'classif"):
        effzoo.transformers.EffzooModel(outer.config, model=model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "modernbert", "albert"])
def test_hidden_states_and_attention_weights_equal_those_of_transformers(name):
    sizes = {key: value for key, value in sizes_of(name).items() if key != "attention"} | {"pad_token": 0}
    task = "causal_lm" if name in ("gpt2", "llama") else "masked_lm"
    torch.manual_seed(0)
    mine = effzoo.build(name, task=task, **sizes).double().eval()
    theirs = effzoo.convert.to_transformers(mine)
    theirs.set_attn_implementation("eager")
    ids = torch.randint(5, mine.config.vocab, (2, 17))
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[1, 12:] = 0
    out = wrap(mine)(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    expected = theirs(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(expected.hidden_states) == mine.config.layers + 1
    for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], rtol=0, atol=1e-5)
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        keep = mask.bool()[:, None, :, None].expand_as(a)
        torch.testing.assert_close(a[keep], b[keep].to(a), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", effzoo.attention.names())
@pytest.mark.parametrize("peft", [None, "prefix[length=3]"])
def test_attention_weights_times_values_are_the_output_of_every_kind(kind, peft):
    model = built(attention=small(kind)).double()
    if peft and not model.blocks[0].attn.core.takes_memory():
        return
    if peft:
        effzoo.attach(model, peft)
        model.eval()
    core, seen = model.blocks[0].attn.core, {}
    core.register_forward_hook(
        lambda core, given, more, out: seen.update(given=given, more=more, out=out), with_kwargs=True
    )
    if kind == "linformer":
        with pytest.raises(IncompatibleError, match="compresses the keys"):
            model(tokens(), output_attentions=True)
        return
    weights = model(tokens(), output_attentions=True)["attentions"][0]
    values = dict(zip(core.projections, seen["given"], strict=True))["v"]
    if seen["more"].get("memory") is not None:
        more = seen["more"]["memory"][1]
        values = torch.cat([more.expand(len(values), *more.shape[-3:]), values], dim=2)
    if kind != "longformer":  # whose global token has values of its own
        torch.testing.assert_close(weights @ values, seen["out"], rtol=0, atol=1e-10)
    near = 0.1 if kind == "nystromformer" else 1e-10  # whose Z is near the inverse after six iterations
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), rtol=0, atol=near)


def test_what_cannot_be_shown_is_said():
    model = built("causal_lm")
    with pytest.raises(IncompatibleError, match="not with a cache"):
        wrap(model)(tokens(), use_cache=True, output_hidden_states=True)
    with pytest.raises(InputError, match="past_key_values is an effzoo.attention.Cache, got tuple"):
        wrap(model)(tokens(), past_key_values=())
    perceiver = effzoo.build("perceiver", task="classification", **sizes_of("perceiver"))
    with pytest.raises(InputError, match="a Perceiver takes no output_attentions"):
        wrap(perceiver)(
            inputs_embeds=torch.zeros(1, *perceiver.config.grid, perceiver.config.channels), output_attentions=True
        )


def test_token_types_that_are_zero_may_be_given_to_any_model():
    model = wrap(built("masked_lm", types=0))
    zero = torch.zeros(2, 17, dtype=torch.long)
    assert torch.equal(model(tokens(), token_type_ids=zero).logits, model(tokens()).logits)
    with pytest.raises(InputError, match="token_type_ids"):
        model(tokens(), token_type_ids=zero + 1)


def test_text_goes_on_as_with_effzoo_generate(tmp_path):
    model = built("causal_lm", attention="longformer[window=8]")
    outer, prompt = wrap(model), tokens(n=5)
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    expected = effzoo.generate(model, prompt, mask, max_new_tokens=9, eos_token_id=None)
    outer.generation_config.eos_token_id = None
    assert torch.equal(outer.generate(prompt, attention_mask=mask, max_new_tokens=9), expected)
    assert torch.equal(outer.generate(input_ids=prompt, attention_mask=mask, max_length=14, use_cache=False), expected)
    outer.generation_config.max_new_tokens, outer.generation_config.num_beams = 4, 3
    outer.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).num_beams == 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = effzoo.generate(model, prompt, max_new_tokens=4, num_beams=3, eos_token_id=None)
    assert torch.equal(again.generate(prompt), expected)
    assert torch.equal(effzoo.generate(effzoo.load(tmp_path), prompt, eos_token_id=None), expected)
    out = again.generate(prompt, return_dict_in_generate=True, output_scores=True, num_beams=1)
    assert len(out.scores) == 4 and out.sequences.shape == (2, 9)
    with pytest.raises(OptionError, match="no output_attentions=True"):
        outer.generate(prompt, output_attentions=True)
    with pytest.raises(InputError, match="99 new tokens do not fit"):
        outer.generate(prompt, max_new_tokens=99)


def test_a_cache_is_passed_on_in_a_loop_of_ones_own():
    outer, ids = wrap(built("causal_lm")), tokens()
    whole = outer(ids).logits
    out = outer(ids[:, :10], use_cache=True)
    rest = outer(ids[:, 10:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], 1), whole, rtol=0, atol=1e-5)
    assert torch.equal(outer(ids, logits_to_keep=3).logits, whole[:, -3:])


def test_tokens_of_the_configuration_and_of_the_vocabulary(tmp_path):
    outer = wrap(built("causal_lm"))
    outer.config.pad_token_id, outer.config.eos_token_id = 7, [1, 2]
    outer(tokens())
    assert outer.inner.config.pad_token == 7 and outer.inner.config.eos_token == (1, 2)
    assert outer.resize_token_embeddings(66) is outer.get_input_embeddings()
    assert outer.config.vocab_size == 66 and outer(tokens()).logits.shape[-1] == 66
    assert outer.resize_token_embeddings(60).num_embeddings == 60
    outer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.pad_token_id == 7 and torch.equal(first(again), first(outer))
    with pytest.raises(IncompatibleError, match="resize_token_embeddings"):
        outer.set_input_embeddings(torch.nn.Embedding(3, 4))


def test_files_have_the_size_that_is_asked_for(tmp_path):
    model = wrap(built())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(first(AutoModelForSequenceClassification.from_pretrained(tmp_path)), first(model))


def test_the_problem_that_a_configuration_names_is_the_loss_that_is_computed(tmp_path):
    model = wrap(built())
    for problem, labels in (
        ("single_label_classification", torch.tensor([0, 2])), ("multi_label_classification", torch.ones(2, 3)),
    ):  # fmt: skip
        model.config.problem_type = problem
        assert model(tokens(), labels=labels).loss > 0
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).problem_type == "multi_label_classification"
    effzoo.load(tmp_path)
    model.config.problem_type = "regression"
    with pytest.raises(InputError, match="config.problem_type is 'regression', and labels of torch.float32 for 3"):
        model(tokens(), labels=torch.ones(2, 3))


@pytest.mark.parametrize(("number", "labels", "problem"), [
    (3, [0, 2], "single_label_classification"), (3, [[0.0, 1.0, 1.0]] * 2, "multi_label_classification"),
    (1, [0.5, -1.0], "regression"),
])  # fmt: skip
def test_what_the_labels_were_is_kept(tmp_path, number, labels, problem):
    model = built(num_labels=number, types=2)
    assert number == 1 or wrap(model).config.problem_type is None
    model(tokens(), labels=torch.tensor(labels))
    effzoo.save(model, tmp_path / "a")
    again = effzoo.load(tmp_path / "a")
    effzoo.save(again, tmp_path / "b")
    assert AutoConfig.from_pretrained(tmp_path / "b").problem_type == problem
    theirs = effzoo.convert.to_transformers(model).eval()
    theirs(tokens(), labels=torch.tensor(labels))
    assert theirs.config.problem_type == problem  # transformers notes it as well
    outer = wrap(built(num_labels=number, types=2))
    outer(tokens(), labels=torch.tensor(labels))
    assert outer.config.problem_type == problem


def test_what_is_no_folder_of_a_model_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("nobody/there", "one/two/three"):
        with pytest.raises(FileError, match=f"'{name}' is no local folder, and as a hub id it could not be fetched"):
            effzoo.transformers.EffzooModel.from_pretrained(name)
    model = effzoo.attach(built(), "lora")
    effzoo.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FileError, match="holds an adapter, which is no model: effzoo.load_adapter"):
        effzoo.load(tmp_path / "adapter")
    with pytest.raises(FileError, match="source is empty"):
        effzoo.load("")
    with pytest.raises(FileError, match="folder is empty"):
        effzoo.save(model, "")
    effzoo.save(model, tmp_path / "model")
    with pytest.raises(OptionError, match="takes no attn_implementation='sdpa' of a folder of effzoo"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation="sdpa")
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").num_labels == 3
    with pytest.raises(AttributeError, match="num_labels.*; it is transformers' name, which the config of .*wrap"):
        model.config.num_labels  # noqa: B018


def test_a_new_head_has_no_problem_yet(tmp_path):
    model = built(num_labels=1)
    effzoo.save(model, tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).problem_type == "regression"
    other = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert other.config.problem_type is None and other(tokens(), labels=torch.tensor([3, 0])).loss > 0
    assert other.config.problem_type == "single_label_classification"


def test_a_model_of_transformers_compiles_whole():
    outer = wrap(built())
    compiled = torch.compile(outer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(tokens())[0], outer(tokens())[0])
    loss = compiled(tokens(), labels=torch.tensor([0, 2])).loss
    assert torch.equal(loss, outer(tokens(), labels=torch.tensor([0, 2])).loss)


@pytest.mark.parametrize("given", [{"quantization_config": {}}, {"device_map": {"a": 0}}, {"strange": 1}])
def test_what_has_no_meaning_is_refused(given, tmp_path):
    effzoo.save(built(), tmp_path)
    with pytest.raises(OptionError, match=f"no {next(iter(given))}=|device_map"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **given)
    with pytest.raises(OptionError, match="save_pretrained takes no variant"):
        wrap(built()).save_pretrained(tmp_path, variant="fp16")
