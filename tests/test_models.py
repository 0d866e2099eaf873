"""Whole models: sizes, inputs that do not fit, padding, prompts, tasks, checkpointing."""

import copy

import pytest
import torch
from support import sizes_of, task_of

import effzoo
from effzoo.errors import IncompatibleError, InputError, OptionError, TargetError, UnknownNameError


def ids(*shape):
    return torch.randint(2, 53, shape)


@pytest.fixture
def model(tiny):
    return effzoo.build("bert", task="classification", num_labels=3, **tiny).eval()


PUBLISHED = {
    "bert": 109_482_240, "albert": 11_683_584, "roberta": 124_645_632, "gpt2": 124_439_808, "longformer": 148_659_456,
    "bigbird": 127_468_800,
    "longformer-large": 434_600_960, "minilm": 22_713_216, "llama": 1_235_814_400, "mistral": 7_110_660_096,
    "qwen2": 494_032_768, "qwen3": 596_049_920, "xlm-roberta": 278_043_648, "smollm3": 3_075_098_624,
    "olmo2": 1_279_395_840, "gemma2": 2_614_341_888, "gemma3": 999_885_952, "mixtral": 46_571_720_704,
    "electra": 108_891_648,
    "nomic-bert": 136_731_648, "eurobert": 211_766_016, "modernbert": 149_014_272, "led": 104_345_856,
    "blockbert": 109_482_240,
    "linformer": 124_645_632 + 256 * 512,
    "perceiver": 44_912_254 - 1_025_000, "perceiver-io": 196_249_088, "reformer": 2_584_064,
    "reformer-enwik8": 148_654_080, "bart": 139_420_416, "led-seq2seq": 161_844_480, "t5": 60_506_624,
}  # fmt: skip
WITH_LM_HEAD = {"llama": 1_235_814_400, "mistral": 7_241_732_096, "qwen2": 494_032_768, "qwen3": 596_049_920,
    "modernbert": 149_655_232, "smollm3": 3_075_098_624, "olmo2": 1_484_916_736, "gemma2": 2_614_341_888,
    "gemma3": 999_885_952, "mixtral": 46_702_792_704,
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_zoo_entries_have_the_published_number_of_parameters(name):
    """Counts of the classes of transformers with the published configuration, built on the meta device (BertModel with
    pooler, the encoder alone of LEDModel, and so on). BlockBERT is BERT; Linformer is RoBERTa and one matrix of k x
    max_length for all layers.
    Perceiver has 44.9 M with the 1,000 classes of ImageNet (test_perceiver), Perceiver IO the encoder of
    PerceiverForMaskedLM.
    """
    with torch.device("meta"):
        model = effzoo.build(name)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", sorted(WITH_LM_HEAD))
def test_language_models_have_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = effzoo.build(name, task="masked_lm" if name == "modernbert" else "causal_lm")
    assert sum(p.numel() for p in model.parameters()) == WITH_LM_HEAD[name]


def test_every_entry_of_the_zoo_is_counted():
    assert set(PUBLISHED) == set(effzoo.models())


def test_the_line_the_project_exists_for():
    model = effzoo.build("longformer", peft="lora", layers=1)
    assert [core.name for core in model.cores()] == ["longformer"] and list(effzoo.attached(model)) == ["default"]


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (
            ("longfromer",),
            UnknownNameError,
            r"unknown model 'longfromer'; did you mean 'longformer'\? Known: albert, bart, bert",
        ),
        (("bert", {"dims": 8}), OptionError, r"model 'bert' has no size 'dims'; did you mean 'dim'\?"),
        (
            ("bert", {"layers": "six"}),
            OptionError,
            r"size 'layers' of model 'bert' takes int \(from 1 to 10,000\), got 'six'",
        ),
        (("bert", {"heads": 5}), OptionError, "dim 768 does not divide into 5 heads; try heads="),
        (("bert", {"layers": 0}), OptionError, "layers is at least 1"),
        (("bert", {"dropout": 1.5}), OptionError, r"dropout is in \[0, 1\)"),
        (("bert", {"activation": "swoosh"}), OptionError, "activation is one of gelu"),
        (("bert", {"task": "clasification"}), OptionError, "task is one of features, classification"),
        (
            ("bert", {"task": "causal_lm"}),
            IncompatibleError,
            "bert is an encoder, so task='causal_lm' makes no sense; try task='masked_lm'",
        ),
        (("gpt2", {"task": "masked_lm"}), IncompatibleError, "gpt2 is a decoder"),
        (("bert", {"attention": "fulll"}), UnknownNameError, "did you mean 'full'"),
        (("bert", {"attention": ("full",) * 3}), OptionError, "3 attention specs for 12 layers"),
    ],
)
def test_build_says_what_it_cannot_build(arguments, error, said):
    with pytest.raises(error, match=said):
        effzoo.build(arguments[0], **(arguments[1] if len(arguments) > 1 else {}))


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "give either input_ids or inputs_embeds"),
        ({"input_ids": ids(2, 5), "inputs_embeds": torch.zeros(2, 5, 16)}, "not both"),
        ({"input_ids": ids(5)}, r"integer tensor \[batch, n\], got torch.int64 of shape \(5,\)"),
        ({"input_ids": torch.zeros(2, 5)}, r"got torch.float32 of shape \(2, 5\)"),
        ({"input_ids": ids(2, 0)}, "the sequence is empty"),
        (
            {"input_ids": ids(2, 65)},
            "65 tokens do not fit into max_length 64; truncate to 64, or build the model with max_length=65",
        ),
        (
            {"input_ids": torch.full((1, 3), 53)},
            r"input_ids are in \[0, 53\), got 53 to 53; is this the model's tokenizer",
        ),
        ({"input_ids": torch.full((1, 3), -1)}, r"input_ids are in \[0, 53\)"),
        ({"inputs_embeds": torch.zeros(2, 5, 8)}, r"\[batch, n, 16\], got torch.float32 of shape \(2, 5, 8\)"),
        (
            {"input_ids": ids(2, 5), "attention_mask": torch.ones(2, 6)},
            r"attention_mask has shape \(2, 6\), the input needs \(2, 5\)",
        ),
        ({"input_ids": ids(2, 5), "attention_mask": torch.full((2, 5), 2)}, "attention_mask holds 0 and 1"),
        ({"input_ids": ids(2, 5), "global_attention_mask": torch.ones(5)}, "global_attention_mask has shape"),
        ({"input_ids": ids(2, 5), "token_type_ids": torch.full((2, 5), 2)}, r"token_type_ids are in \[0, 2\)"),
        ({"input_ids": ids(2, 5), "position_ids": torch.full((2, 5), 64)}, r"position_ids are in \[0, 63\], got 64"),
        ({"input_ids": ids(2, 5), "position_ids": torch.zeros(2, 5)}, "position_ids is an integer tensor"),
        (
            {"input_ids": ids(2, 5), "labels": torch.tensor([0, 3])},
            r"labels are in \[0, 3\) or -100, got 0 to 3; check num_labels",
        ),
        ({"input_ids": ids(2, 5), "labels": torch.zeros(2)}, r"labels are integers of shape \(2,\)"),
        (
            {"input_ids": ids(2, 5), "labels": torch.zeros(2, 5, dtype=torch.long)},
            r"labels are integers of shape \(2,\)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_numbers(model, inputs, said):
    with pytest.raises(InputError, match=said):
        model(**inputs)


def test_prompt_rows_count_towards_the_length(model):
    effzoo.attach(model, "prompt[length=10]")
    with pytest.raises(
        InputError, match="60 tokens and 10 prompt tokens do not fit into max_length 64; truncate to 54"
    ):
        model(ids(1, 60))


def test_features_have_no_loss(tiny):
    with pytest.raises(InputError, match="task 'features' has no loss"):
        effzoo.build("bert", **tiny)(ids(1, 3), labels=torch.tensor([0]))


@pytest.mark.parametrize(
    "name",
    ["bert", "roberta", "gpt2", "longformer", "minilm", "llama", "mistral", "qwen2", "qwen3", "modernbert", "led"],
)
@pytest.mark.parametrize("spec", [None, "prompt[length=2]|prefix[length=3]|lora|ia3|houlsby"])
def test_what_stands_under_padding_changes_nothing(tiny, name, spec):
    """Right padding: other ids under the mask leave logits and pooled logits equal; a row alone, without padding, gives
    the same."""
    for task in ("classification", "token_classification"):
        sizes = DECODER if name in ("llama", "mistral", "qwen2", "qwen3") else {}
        model = effzoo.build(name, task=task, num_labels=3, peft=spec, **tiny, **sizes).double().eval()
        tokens = ids(2, 11)
        mask = torch.ones_like(tokens)
        mask[1, 6:], tokens[1, 6:] = 0, 1
        out = model(tokens, mask).logits
        alone = model(tokens[1:, :6]).logits
        # their positions follow the pad token, so other ids there are other positions
        if name not in ("roberta", "longformer"):
            changed = tokens.clone()
            changed[1, 6:] = 40
            other = model(changed, mask).logits
            real = mask.bool() if task == "token_classification" else slice(None)
            assert torch.allclose(other[real], out[real], rtol=0, atol=1e-12)
        assert torch.allclose(out[1:, :6] if task == "token_classification" else out[1:], alone, rtol=0, atol=1e-12)


def test_longformer_classifies_with_the_first_token_global_by_default(tiny):
    model = effzoo.build("longformer", task="classification", attention="longformer[window=2]", **tiny).eval()
    tokens, first = ids(2, 11), torch.zeros(2, 11)
    first[:, 0] = 1
    assert torch.equal(model(tokens).logits, model(tokens, global_attention_mask=first).logits)
    assert not torch.allclose(model(tokens).logits, model(tokens, global_attention_mask=torch.zeros(2, 11)).logits)


def test_losses_are_the_textbook_ones(tiny):
    labels = torch.tensor([2, 0])
    model = effzoo.build("bert", task="classification", num_labels=3, **tiny).eval()
    out = model(ids(2, 5), labels=labels)
    assert torch.allclose(out.loss, -out.logits.log_softmax(-1)[torch.arange(2), labels].mean())
    several = model(ids(2, 5), labels=torch.tensor([[1.0, 0, 1], [0, 0, 0]]))
    sign = torch.tensor([[1.0, -1, 1], [-1, -1, -1]])
    assert torch.allclose(several.loss, -torch.nn.functional.logsigmoid(sign * several.logits).mean())
    number = effzoo.build("bert", task="classification", num_labels=1, **tiny).eval()(
        ids(2, 5), labels=torch.tensor([0.5, 2.0])
    )
    assert torch.allclose(number.loss, ((number.logits[:, 0] - torch.tensor([0.5, 2.0])) ** 2).mean())
    tokens = ids(2, 5)
    shifted = tokens.clone()
    shifted[0, 3] = -100
    causal = effzoo.build("gpt2", task="causal_lm", **tiny).eval()(tokens, labels=shifted)
    logs = causal.logits.log_softmax(-1)
    terms = [logs[b, t, tokens[b, t + 1]] for b in range(2) for t in range(4) if shifted[b, t + 1] != -100]
    assert torch.allclose(causal.loss, -torch.stack(terms).mean())


def test_labels_that_do_not_count_give_loss_zero_not_nan(tiny):
    out = effzoo.build("bert", task="masked_lm", **tiny)(ids(2, 5), labels=torch.full((2, 5), -100))
    assert out.loss == 0


@pytest.mark.parametrize("name", ["gpt2", "minilm", "bert"])
def test_pooling_reads_the_last_the_mean_and_the_first_token(tiny, name):
    model = effzoo.build(name, task="classification", **tiny).double().eval()
    tokens, mask = ids(2, 7), torch.ones(2, 7)
    mask[1, 4:] = 0
    out = model(tokens, mask)
    hidden = out.last_hidden_state
    pooled = {
        "gpt2": hidden[[0, 1], [6, 3]],
        "minilm": torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0)]),
        "bert": hidden[:, 0],
    }[name]
    x = model.head.dense(pooled).tanh() if name == "bert" else pooled
    assert torch.allclose(out.logits, model.head.out(x), atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "longformer"])
def test_checkpointed_activations_give_the_same_gradients_with_frozen_embeddings(tiny, name):
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = effzoo.build(name, task="classification", peft="lora|prefix|houlsby", **tiny).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(torch.arange(2, 22).reshape(2, 10), labels=torch.tensor([0, 1])).loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grad, found[1][key]) for key, grad in found[0].items() if grad is not None)
    assert [key for key, grad in found[0].items() if grad is None] == [
        key for key, grad in found[1].items() if grad is None
    ]


def test_the_backend_is_chosen_by_name(tiny):
    fused, plain = (effzoo.build("bert", backend=backend, **tiny).eval() for backend in ("flash", "reference"))
    plain.load_state_dict(fused.state_dict())
    tokens = ids(2, 9)
    assert torch.allclose(fused(tokens).last_hidden_state, plain(tokens).last_hidden_state, atol=1e-5)
    with pytest.raises(OptionError, match="'flash' cannot run here: attention dropout 0.1"):
        effzoo.build("bert", **{**tiny, "backend": "flash", "attention_dropout": 0.1}).train()(tokens)


def test_output_reads_as_dict_and_by_attribute(model):
    out = model(ids(1, 4))
    assert list(out) == ["logits", "last_hidden_state"] and out.loss is None and out.logits is out["logits"]
    with pytest.raises(AttributeError, match="the output has no 'logit'"):
        _ = out.logit


# --- today's bases: any attention and any method


DECODER = {"kv_heads": 1, "head_dim": 8}
METHODS = ["lora", "prefix[length=3]", "houlsby", "ia3", "prompt[length=2]"]
KINDS = {  # options that fit tiny sizes, for the kinds whose defaults do not
    "longformer": "longformer[window=4]", "blockwise": "blockwise[blocks=2]", "linformer": "linformer[k=8]",
    "perceiver": "perceiver[latents=4]",
}  # fmt: skip


def combinations():
    for base, causal in (("llama", True), ("modernbert", False)):
        for kind in effzoo.attention.names():
            if not causal or not effzoo.attention.get(kind).not_causal:
                for method in METHODS:
                    if not method.startswith("prefix") or effzoo.attention.get(kind).takes_memory():
                        yield base, KINDS.get(kind, kind), method


@pytest.mark.parametrize(("base", "attention", "method"), list(combinations()))
def test_every_attention_and_method_trains_on_the_bases_of_today(tiny, base, attention, method):
    """One step: the base is frozen, and every trainable tensor of the adapter has a finite gradient, which is not 0 but
    where it starts as 0."""
    sizes = DECODER if base == "llama" else {}
    model = effzoo.build(
        base, **{**tiny, **sizes, "attention": attention}, task="token_classification", num_labels=3, peft=method
    ).train()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapters." in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    tokens, mask, marked = ids(2, 20), torch.ones(2, 20), torch.zeros(2, 20)
    mask[1, 15:], marked[:, 7] = 0, 1
    is_global = marked if attention.startswith("longformer") else None  # without, its global projections do nothing
    labels = torch.randint(3, (2, 20)).masked_fill(mask == 0, -100)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    # small gradients move as far as large ones
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01, eps=1e-16)
    model(tokens, mask, global_attention_mask=is_global, labels=labels).loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == (".adapters." in key), key
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, (
                key
            )
    optimizer.step()
    for key, parameter in model.named_parameters():
        assert parameter.equal(before[key]) != parameter.requires_grad, key


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "modernbert"])
def test_bitfit_says_that_there_are_no_biases(tiny, name):
    model = effzoo.build(name, **tiny, **(DECODER if name != "modernbert" else {}))
    with pytest.raises(TargetError, match="bitfit: none of the .* sites has anything to adapt"):
        effzoo.attach(model, "bitfit")


def test_modernbert_classifies_without_a_global_token_unless_asked(tiny):
    model = effzoo.build(
        "modernbert", task="classification", **{**tiny, "attention": "longformer[window=2, global_projections=false]"}
    ).eval()
    tokens, first = ids(2, 11), torch.zeros(2, 11)
    assert torch.equal(model(tokens).logits, model(tokens, global_attention_mask=first).logits)
    first[:, 0] = 1
    assert not torch.allclose(model(tokens).logits, model(tokens, global_attention_mask=first).logits)


@pytest.mark.parametrize("layers", [1, 2, 4, 22, 25])
def test_the_layers_of_modernbert_alternate_for_any_number_of_them(layers):
    config = effzoo.zoo.config("modernbert", layers=layers)
    local = "longformer[window=128, global_projections=false]"
    assert list(config.attention) == [local if i % 3 else "full" for i in range(layers)]
    assert [config.slots(i).rotary.theta for i in range(layers)] == [
        10_000.0 if i % 3 else 160_000.0 for i in range(layers)
    ]
    with torch.device("meta"):
        assert len(effzoo.build("modernbert", layers=layers, attention="full").blocks) == layers


@pytest.mark.parametrize(("repeat", "said"), [
    ("attention = 'full'", r"\[repeat\] is a table of lists"), ("attention = []", r"\[repeat\] is a table of lists"),
    ("atention = ['full']", "unknown key 'atention'; did you mean 'attention'"),
])  # fmt: skip
def test_a_table_of_repeated_values_is_checked(tmp_path, repeat, said):
    entry = (
        "layout = 'bert'\narchitecture = 'encoder'\nvocab = 5\ndim = 8\nlayers = 4\nheads = 2\nmlp = "
        "8\nmax_length = 9\n[repeat]\n"
    )
    (tmp_path / "mine.toml").write_text(entry + repeat)
    with pytest.raises(OptionError, match=said):
        effzoo.build(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("name", ["bert", "gpt2", "perceiver-io"])
def test_inputs_on_another_device_than_the_model_name_both(tiny, name):
    sizes = {"dim": 8, "layers": 1, "latents": 4, "vocab": 53, "max_length": 16} if name == "perceiver-io" else tiny
    model, there = effzoo.build(name, **sizes), effzoo.build(name, **sizes).to("meta")
    ids = torch.ones(2, 5, dtype=torch.long)
    for subject, given, told in (
        (model, {"input_ids": ids.to("meta")},
        r"input_ids is on meta and the model on cpu; bring it there, as in input_ids\.to\('cpu'\)"),
        (there, {"input_ids": ids}, "input_ids is on cpu and the model on meta"),
        (there, {"input_ids": ids, "attention_mask": ids}, "input_ids is on cpu and the model on meta"),
        (model, {"input_ids": ids, "attention_mask": ids.to("meta")}, "input_ids is on cpu and attention_mask on meta"),
        (model,
        {"inputs_embeds": torch.zeros(2, 5, model.config.embed_dim if name != "perceiver-io" else model.config.channels,
        device="meta")},
         "inputs_embeds is on meta and the model on cpu"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            subject(**given)
    model(input_ids=ids, attention_mask=ids), there(input_ids=ids.to("meta"))


@pytest.mark.parametrize("name", effzoo.models())
def test_every_model_of_the_zoo_trains_an_adapter_that_loads_and_merges(name, tmp_path):
    config = effzoo.zoo.config(name)
    base = effzoo.build(name, task=task_of(name), **sizes_of(name)).eval()
    model = effzoo.attach(copy.deepcopy(base), "lora")
    if name == "perceiver":
        inputs = {"inputs_embeds": torch.randn(2, 6, 6, config.channels), "labels": torch.tensor([0, 1])}
    else:
        labels = ids(2, 37) if task_of(name).endswith("_lm") else torch.tensor([0, 1])
        inputs = {"input_ids": ids(2, 37), "labels": labels}
        inputs["input_ids"][:, 0] = torch.tensor([2, 3])  # a head that reads the first token can tell them apart
        if name == "led-seq2seq":  # no task of it makes a token global
            inputs["global_attention_mask"] = (torch.arange(37) == 0).long().expand(2, -1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    first = model(**inputs)
    for _ in range(2):  # in the first step B is 0, and with it the gradient of A
        model(**inputs).loss.backward()
        optimizer.step()
    assert all((p.grad is not None and p.grad.isfinite().all()) == p.requires_grad for p in model.parameters())
    trained = model(**inputs)
    assert trained.loss < first.loss
    loaded = effzoo.load_adapter(copy.deepcopy(base), effzoo.save_adapter(model, tmp_path))
    assert torch.equal(loaded(**inputs).logits, trained.logits)
    torch.testing.assert_close(effzoo.merge(loaded)(**inputs).logits, trained.logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # a table of relative positions that learns is computed by another backend
        assert torch.equal(effzoo.detach(model, "default")(**inputs).logits, first.logits)
