"""From data of each kind to a finetuned model, and to what `effzoo predict`, `generate` and `embed` say of it."""

import csv
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import effzoo
from effzoo.cli import app
from effzoo.data import load_text, names, tokenise, tokenizer_of

VOCABULARY = "ann bob paris rome goal team bank coin lives in good bad the who where ? ."
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *VOCABULARY.split()]
SIZES = "vocab = 64\ndim = 16\nlayers = 2\nheads = 2\nmlp = 32\nmax_length = 32\npad_token = 0\ndropout = 0.0\n"
ENCODER = f'layout = "bert"\narchitecture = "encoder"\ntypes = 2\n{SIZES}'
DECODER = f'layout = "gpt2"\narchitecture = "decoder"\nnorm = "pre"\n{SIZES}'
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=made, chat_template=CHAT, **special).save_pretrained(folder / "plain")
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **special).save_pretrained(
        folder / "words"
    )
    (folder / "encoder.toml").write_text(ENCODER)
    (folder / "decoder.toml").write_text(DECODER)
    return folder


def run(*line):
    done = CliRunner().invoke(app, [str(word) for word in line])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def refused(*line):
    done = CliRunner().invoke(app, [str(word) for word in line])
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    return " ".join(done.output.split())


def finetuned(place, data, output, *more, model="encoder", tokenizer="words", epochs=12):
    return run(
        "finetune", place / f"{model}.toml", "--data", data, "--output", output, "--tokenizer", place / tokenizer,
        "--learning-rate", "0.02", "--epochs", epochs, *more,
    )  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


KINDS = {"sport": ("goal", "team"), "money": ("bank", "coin")}
PLAIN = [
    (f"{word} {other} {word}", kind)
    for kind, words in KINDS.items()
    for word in words
    for other in ("the", "in", "good")
] * 4


def test_names_of_classes_go_from_the_data_to_the_predictions(place, tmp_path):
    for part, rows in (("train", PLAIN), ("dev", PLAIN[:6] + PLAIN[-6:])):
        (tmp_path / "news").mkdir(exist_ok=True)
        text = "sentence\tlabel\n" + "".join(f"{text}\t{kind}\n" for text, kind in rows)
        (tmp_path / f"news/{part}.tsv").write_text(text)
    (tmp_path / "news/test.tsv").write_text('sentence\n" goal team\nbank , "coin"\n')
    said = finetuned(place, tmp_path / "news", tmp_path / "run", "--peft", "lora[rank=2]")
    assert (
        "48 texts to train on, 12 to evaluate on" in said and "2 labels: money, sport" in said and "accuracy 1 " in said
    )
    assert effzoo.load(tmp_path / "run").label_names == ("money", "sport")
    run("predict", tmp_path / "run", "--data", tmp_path / "news", "--part", "test", "--output", tmp_path / "a.jsonl")
    found = lines(tmp_path / "a.jsonl")
    assert [(row["text"], row["label"]) for row in found] == [('" goal team', "sport"), ('bank , "coin"', "money")]
    assert all(0.5 < row["probability"] <= 1 for row in found)
    run("predict", tmp_path / "run", "--data", tmp_path / "news/test.tsv", "--output", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        again = list(csv.DictReader(file))
    assert [(row["text"], row["label"]) for row in again] == [(row["text"], row["label"]) for row in found]
    shown = run("predict", tmp_path / "run", "--data", tmp_path / "news/test.tsv")
    assert json.loads(shown[: shown.index("}") + 1])["label"] == "sport"
    assert ".csv or .jsonl file, got" in refused(
        "predict", tmp_path / "run", "--data", tmp_path / "news/test.tsv", "--output", tmp_path / "a.txt"
    )
    # the folder is a teacher, and goes on from its own order of labels
    taught = finetuned(place, tmp_path / "news", tmp_path / "two", "--teacher", tmp_path / "run", epochs=1)
    assert "accuracy" in taught
    assert "says its attention itself" in refused(
        "finetune", place / "encoder.toml", "--data", tmp_path / "news", "--output", tmp_path / "x", "--tokenizer",
        place / "words", "--teacher", tmp_path / "run", "--teacher-attention", "full",
    )  # fmt: skip


def test_pairs_are_read_with_types_and_regression_gives_numbers(place, tmp_path):
    rows = [("ann good", "bob good", 1.0), ("ann good", "bob bad", -1.0), ("ann bad", "bob bad", 1.0)] * 8
    (tmp_path / "a.csv").write_text("one,two,score\n" + "".join(f"{a},{b},{c:g}\n" for a, b, c in rows))
    said = finetuned(
        place, tmp_path / "a.csv", tmp_path / "run", "--task", "regression", "--text", "one", "--text-pair", "two",
        "--peft", "none", epochs=25,
    )  # fmt: skip
    assert "pearson" in said and "mse" in said
    run(
        "predict", tmp_path / "run", "--data", tmp_path / "a.csv", "--text", "one", "--text-pair", "two", "--output",
        tmp_path / "a.jsonl",
    )  # fmt: skip
    values = [row["value"] for row in lines(tmp_path / "a.jsonl")][:3]
    assert values == pytest.approx([1, -1, 1], abs=0.4)
    words = tokenizer_of(place / "words")
    tokens = tokenise(load_text(tmp_path / "a.csv", text="one", text_pair="two"), words, 16, task="features")
    assert tokens[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    given = [{name: row[name] for name in ("input_ids", "token_type_ids")} for row in tokens.select(range(3))]
    assert effzoo.predict(effzoo.load(tmp_path / "run"), given)[:, 0].tolist() == pytest.approx(values, abs=1e-5)


def test_several_labels_are_learnt_and_told(place, tmp_path):
    rows = [
        (f"{a} {b}", [kind for kind, words in KINDS.items() if {a, b} & {*words}])
        for a in WORDS[9:13]
        for b in WORDS[9:15]
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": a, "label": b}) for a, b in rows * 2))
    said = finetuned(
        place, tmp_path / "a.jsonl", tmp_path / "run", "--task", "multi_label", "--peft", "none", epochs=20
    )
    assert "f1" in said and "exact_match" in said and "2 labels: money, sport" in said
    run("predict", tmp_path / "run", "--data", tmp_path / "a.jsonl", "--multi-label", "--output", tmp_path / "b.jsonl")
    found = lines(tmp_path / "b.jsonl")
    assert [sorted(row["labels"]) for row in found[:24]] == [sorted(labels) for _, labels in rows]
    assert {*found[0]["probabilities"]} == {"money", "sport"}
    run("predict", tmp_path / "run", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "c.jsonl")
    assert lines(tmp_path / "c.jsonl") == found  # the folder says that several may hold


def test_several_labels_are_refused_of_a_model_that_was_trained_on_one(place, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "goal,sport\nbank,money\n" * 6)
    finetuned(place, tmp_path / "a.csv", tmp_path / "run", epochs=1)
    said = refused("predict", tmp_path / "run", "--data", tmp_path / "a.csv", "--multi-label")
    assert "--multi-label is for several labels of a text" in said and "has one" in said


def test_tags_of_words_are_learnt_and_told(place, tmp_path):
    people, places = ("ann", "bob"), ("paris", "rome")
    rows = [[(a, "B-PER"), ("lives", "O"), ("in", "O"), (b, "B-LOC"), (".", "O")] for a in people for b in places] * 6
    (tmp_path / "a.conll").write_text("\n\n".join("\n".join(map(" ".join, row)) for row in rows))
    said = finetuned(place, tmp_path / "a.conll", tmp_path / "run", "--task", "token_classification")
    assert "f1 1 " in said and "3 labels: O, B-LOC, B-PER" in said
    (tmp_path / "new.txt").write_text("bob lives in rome .\n")
    run("predict", tmp_path / "run", "--data", tmp_path / "new.txt", "--output", tmp_path / "a.jsonl")
    assert lines(tmp_path / "a.jsonl")[0]["words"] == ["bob", "lives", "in", "rome", "."]
    assert lines(tmp_path / "a.jsonl")[0]["tags"] == ["B-PER", "O", "O", "B-LOC", "O"]
    run("predict", tmp_path / "run", "--data", tmp_path / "new.txt", "--output", tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().splitlines()[:2] == ["row,word,tag", "0,bob,B-PER"]
    assert "--stride has no meaning for --task token_classification" in refused(
        "finetune", place / "encoder.toml", "--data", tmp_path / "a.conll", "--output", tmp_path / "x", "--task",
        "token_classification", "--stride", "3",
    )  # fmt: skip


def test_questions_are_answered_over_windows(place, tmp_path):
    rows = []
    for who in ("ann", "bob"):
        for where in ("paris", "rome"):
            for front in (0, 3, 16):
                context = " ".join([*["the good team ."] * front, f"{who} lives in {where} ."])
                for question, answer in (("where ?", where), ("in ?", where)):
                    answers = {"text": [answer], "answer_start": [context.index(answer)]}
                    rows.append({"id": str(len(rows)), "question": question, "context": context, "answers": answers})
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    said = finetuned(
        place, tmp_path / "train.jsonl", tmp_path / "run", "--task", "question_answering", "--peft", "none",
        "--attention", "longformer[window=8]", "--evaluation", tmp_path / "train.jsonl", "--stride", "4", epochs=8,
    )  # fmt: skip
    assert "48 texts (" in said and " rows) to train on, 48 (" in said, said
    assert "exact_match" in said and "f1" in said
    run(
        "predict",
        tmp_path / "run",
        "--data",
        tmp_path / "train.jsonl",
        "--stride",
        "4",
        "--output",
        tmp_path / "a.jsonl",
    )
    found = lines(tmp_path / "a.jsonl")
    right = sum(row["answer"] == true["answers"]["text"][0] for row, true in zip(found, rows * 2, strict=True))
    assert right / len(found) > 0.8, found[:4]
    row = found[0]
    assert rows[0]["context"][row["start"] : row["start"] + len(row["answer"])] == row["answer"]


def test_a_decoder_learns_lines_packed_and_goes_on(place, tmp_path):
    (tmp_path / "a.txt").write_text("ann lives in rome .\n\nbob lives in paris .\n" * 20)
    said = finetuned(
        place, tmp_path / "a.txt", tmp_path / "run", "--task", "causal_lm", "--packing", "--peft", "none",
        model="decoder", tokenizer="plain", epochs=30,
    )  # fmt: skip
    assert "perplexity" in said
    said = run("generate", tmp_path / "run", "--prompt", "bob lives", "--max-new-tokens", "2", "--greedy")
    assert said == "bob livesin paris" or said == "bob lives in paris" or "in paris" in said
    drawn = ["--do-sample", "--top-k", "3", "--temperature", "2", "--num-return-sequences", "2", "--seed", "4"]
    line = ["generate", tmp_path / "run", "--prompt", "ann", "--max-new-tokens", "3", *drawn]
    assert run(*line) == run(*line)
    assert "in" in run(
        "generate", tmp_path / "run", "--chat", "--prompt", "ann lives", "--max-new-tokens", "1", "--greedy"
    )
    assert "give --chat" in refused("generate", tmp_path / "run", "--prompt", "ann", "--system", "x")
    assert "has no labels; use effzoo generate" in refused("predict", tmp_path / "run", "--data", tmp_path / "a.txt")
    run("embed", tmp_path / "run", "--data", tmp_path / "a.txt", "--output", tmp_path / "a.npy", "--pooling", "last")
    assert np.load(tmp_path / "a.npy").shape == (40, 16)


def test_conversations_train_what_the_assistant_says(place, tmp_path):
    talk = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "bob ."}]
    other = [{"role": "user", "content": "where ?"}, {"role": "assistant", "content": "rome ."}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": m}) for m in (talk, other) * 20))
    finetuned(
        place, tmp_path / "a.jsonl", tmp_path / "run", "--task", "causal_lm", "--peft", "none", model="decoder",
        tokenizer="plain", epochs=20,
    )  # fmt: skip
    line = ["generate", tmp_path / "run", "--chat", "--max-new-tokens", "1", "--greedy", "--prompt"]
    assert (run(*line, "who ?"), run(*line, "where ?")) == ("bob", "rome")


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_the_pooled_states(place, tmp_path, pooling):
    torch.manual_seed(0)
    model = effzoo.build(str(place / "encoder.toml"), task="features").eval()
    effzoo.save(model, tmp_path / "model", tokenizer=tokenizer_of(place / "words"))
    (tmp_path / "a.txt").write_text("ann\nbob lives in rome .\n")
    line = [
        "embed",
        tmp_path / "model",
        "--data",
        tmp_path / "a.txt",
        "--output",
        tmp_path / "a.npy",
        "--pooling",
        pooling,
    ]
    assert "2 x 16" in run(*line)
    vectors = np.load(tmp_path / "a.npy")
    for row, ids in enumerate(([2, 5, 3], [2, 6, 13, 14, 8, WORDS.index("."), 3])):
        hidden = model(torch.tensor([ids])).last_hidden_state[0].detach()
        want = hidden.mean(0) if pooling == "mean" else hidden[0]
        np.testing.assert_allclose(vectors[row], want.numpy(), atol=1e-6)
    run(*line, "--normalise")
    np.testing.assert_allclose(np.linalg.norm(np.load(tmp_path / "a.npy"), axis=1), 1, atol=1e-6)
    assert "--output is a .npy file" in refused(*line[:5], tmp_path / "a.txt")
    assert "mean, cls or last, got 'max'" in refused(*line[:-1], "max")


def test_what_cannot_be_read_is_told_in_one_message(place, tmp_path):
    (tmp_path / "cola.tsv").write_text("gj04\t1\t\tThe sailors rode.\ngj04\t0\t*\tThe.\n" * 10)
    line = [
        "finetune",
        place / "encoder.toml",
        "--data",
        tmp_path / "cola.tsv",
        "--output",
        tmp_path / "x",
        "--tokenizer",
        place / "words",
    ]
    assert "give their 4 names" in refused(*line)
    run(*line, "--columns", "source,label,note,sentence", "--epochs", "1")
    assert "--task is one of" in refused(*line, "--task", "clasification")
    assert "--text-pair is for classification" in refused(*line, "--task", "masked_lm", "--text-pair", "x")
    (tmp_path / "one.csv").write_text("text,label\na,1\nb,1\n")
    assert "all labels are '1'" in refused(*line[:3], tmp_path / "one.csv", *line[4:])
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone/adapter").mkdir()
    assert "adapter without its model" in refused("predict", tmp_path / "lone", "--data", tmp_path / "one.csv")


def test_scores_of_numbers_and_of_several_labels_are_their_definitions():
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import precision_recall_fscore_support
    from transformers import EvalPrediction

    from effzoo.data import label_metrics, number_metrics

    draw = np.random.default_rng(0)
    true, found = draw.integers(0, 4, 50).astype(float), draw.normal(size=(50, 1)).round(1)
    scores = number_metrics(EvalPrediction(found, true))
    assert scores["pearson"] == pytest.approx(pearsonr(true, found[:, 0])[0])
    assert scores["spearman"] == pytest.approx(spearmanr(true, found[:, 0])[0])
    assert scores["mse"] == pytest.approx(((true - found[:, 0]) ** 2).mean())
    labels, logits = draw.integers(0, 2, (50, 4)).astype(float), draw.normal(size=(50, 4))
    scores = label_metrics(EvalPrediction(logits, labels))
    precision, recall, f1, _ = precision_recall_fscore_support(labels, logits > 0, average="micro")
    assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx((precision, recall, f1))
    assert scores["exact_match"] == pytest.approx(((logits > 0) == (labels > 0)).all(1).mean())


def test_predict_gives_each_token_its_logits_whatever_the_batches(place):
    torch.manual_seed(0)
    for task, count in (("token_classification", 3), ("question_answering", 2)):
        model = effzoo.build(str(place / "encoder.toml"), task=task, num_labels=count).eval()
        rows = [{"input_ids": list(range(5, 5 + length))} for length in (3, 7, 1, 5)]
        found = effzoo.predict(model, rows, batch_size=3, progress=False)
        for row, logits in zip(rows, found, strict=True):
            alone = model(torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(logits, alone.detach(), atol=1e-6, rtol=0)


def test_the_names_of_a_split_stay(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "a,x\nb,y\n" * 4)
    assert names(load_text(tmp_path / "a.csv")) == ["x", "y"]


def test_a_checkpoint_of_transformers_says_its_own_names(place, tmp_path):
    import transformers

    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        id2label={0: "bad", 1: "fine"}, label2id={"bad": 0, "fine": 1},
    )  # fmt: skip
    theirs = transformers.BertForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    tokenizer_of(place / "words").save_pretrained(tmp_path / "hf")
    (tmp_path / "a.txt").write_text("ann lives\nbob\n")
    run("predict", tmp_path / "hf", "--data", tmp_path / "a.txt", "--output", tmp_path / "a.jsonl")
    for row, ids in zip(lines(tmp_path / "a.jsonl"), ([2, 5, 13, 3], [2, 6, 3]), strict=True):
        shares = theirs(torch.tensor([ids])).logits[0].softmax(-1)
        assert row["label"] == ("bad", "fine")[int(shares.argmax())]
        assert row["probability"] == pytest.approx(float(shares.max()), abs=1e-5)


def test_a_correlation_that_is_not_defined_loses_no_model(place, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "goal", "label": 1.0}) for _ in range(12)))
    said = finetuned(place, tmp_path / "a.jsonl", tmp_path / "run", "--task", "regression", epochs=1)
    assert "pearson nan" in said and "| eval_pearson | not defined |" in (tmp_path / "run" / "README.md").read_text()
    run("predict", tmp_path / "run", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "b.jsonl")
    refused_line = refused(
        "finetune", place / "encoder.toml", "--data", tmp_path / "a.jsonl", "--output", tmp_path / "c", "--tokenizer",
        place / "words",
    )  # fmt: skip
    assert "are numbers with a fraction, such as 1.0, and --task classification tells names apart" in refused_line


def test_adapters_of_a_saved_model_are_trained_on_or_told(place, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n" + "goal,sport\nbank,money\n" * 6)
    finetuned(place, tmp_path / "a.csv", tmp_path / "run", "--peft", "lora", epochs=1)
    line = ["finetune", tmp_path / "run", "--data", tmp_path / "a.csv", "--output", tmp_path / "on", "--epochs", "1"]
    assert "holds adapters (default), and --peft ia3 would be another" in refused(*line, "--peft", "ia3")
    run(*line, "--peft", "none")
    assert list(effzoo.attached(effzoo.load(tmp_path / "on"))) == ["default"]
    (tmp_path / "q.json").write_text(json.dumps([{"id": "1", "question": "who ?", "context": "ann lives"}] * 4))
    assert "have no answers, so there is nothing to learn" in refused(
        "finetune", place / "encoder.toml", "--data", tmp_path / "q.json", "--task", "question_answering", "--output",
        tmp_path / "no", "--tokenizer", place / "words",
    )  # fmt: skip


def test_lengths_that_a_saved_model_does_not_have(place, tmp_path):
    (tmp_path / "a.txt").write_text("ann lives in rome\n" * 12)
    finetuned(
        place, tmp_path / "a.txt", tmp_path / "run", "--task", "causal_lm", model="decoder", tokenizer="plain", epochs=1
    )
    line = ["generate", tmp_path / "run", "--prompt", "ann lives"]
    run(*line)  # as many tokens as there is room for
    assert "--top-p is about tokens that are drawn; give --do-sample" in refused(*line, "--top-p", "0.9")
    assert "finds no stop texts with the tokenizer" in refused(*line, "--stop", "rome")
    assert "--max-length 33 is more than the 32 tokens" in refused(
        "embed", tmp_path / "run", "--data", tmp_path / "a.txt", "--output", tmp_path / "a.npy", "--max-length", 33
    )


def test_folders_are_trained_on_also_with_more_positions(place, tmp_path):
    """Of `effzoo.save` and of transformers; more positions than were saved are made, not cut."""
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"{text},{kind}\n" for text, kind in PLAIN))
    entry = effzoo.build(str(place / "encoder.toml"), task="classification", num_labels=2)
    effzoo.save(entry, tmp_path / "ours")
    effzoo.convert.to_transformers(entry).save_pretrained(tmp_path / "theirs")
    for name, more in (("ours", ["--max-length", 50]), ("theirs", ["--max-length", 50]), ("theirs", [])):
        line = ["--data", tmp_path / "a.csv", "--output", tmp_path / "out", "--tokenizer", place / "words", *more]
        run("finetune", tmp_path / name, *line, "--epochs", 1, "--peft", "lora", "--overwrite")
        model = effzoo.load(tmp_path / "out")
        assert model.config.max_length == (50 if more else 32) and model.label_names == ("money", "sport")
