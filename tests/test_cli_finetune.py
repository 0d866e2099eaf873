"""`effzoo finetune`: from a file of texts to an adapter that loads, and to the same end after an interruption."""

import json

import pytest
import torch
from typer.testing import CliRunner

import effzoo
from effzoo.cli import app
from effzoo.cli.reading import Options
from effzoo.cli.train import _parts
from effzoo.data import load_text, names
from effzoo.errors import DataError

WORDS = {"sport": "match team goal league player", "business": "market shares profit bank economy"}
TOML = """
layout = "bert"
architecture = "encoder"
vocab = 64
dim = 16
layers = 2
heads = 2
mlp = 32
max_length = 32
types = 2
pad_token = 0
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny model, a tokenizer of whole words, and texts of two kinds."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[MASK]", *(word for text in WORDS.values() for word in text.split())]
    tokens = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    )
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "tiny.toml").write_text(TOML)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for row in range(60):
        label = ("sport", "business")[row % 2]
        chosen = [
            WORDS[label].split()[i]
            for i in torch.randint(5, (int(torch.randint(3, 50, (1,), generator=draw)),), generator=draw)
        ]
        rows.append(json.dumps({"text": " ".join(chosen), "label": label}))
    (tmp_path / "news.jsonl").write_text("\n".join(rows))
    return tmp_path


def arguments(place, output, *more):
    fixed = (
        "finetune",
        str(place / "tiny.toml"),
        "--data",
        str(place / "news.jsonl"),
        "--tokenizer",
        str(place / "words"),
    )
    return [*fixed, "--output", str(place / output), "--learning-rate", "0.02", *more]


def test_a_method_of_ones_own_is_named_from_a_file(place):
    (place / "mine.py").write_text(
        "import torch\nfrom effzoo.peft import Method, PeftModule, register\nfrom effzoo.sites import Linear\n\n"
        "class Shift(PeftModule):\n    def __init__(self, size):\n        super().__init__()\n"
        "        self.shift = torch.nn.Parameter(torch.zeros(size))\n"
        "    def after(self, x, y, context):\n        return y + self.shift\n\n"
        "@register('my_shift')\nclass Mine(Method):\n    'y + phi.'\n"
        "    accepts, default_targets = (Linear,), ('mlp.down',)\n"
        "    def make(self, site):\n        return Shift(site.out_features)\n"
    )
    line = arguments(
        place, "own", "--peft", "my_shift", "--epochs", "1", "--adapter-only", "--file", str(place / "mine.py")
    )
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0 and "my_shift" in done.output, done.output
    assert "my_shift" in (place / "own/adapter/adapter.json").read_text()
    assert "my_shift" not in effzoo.peft.names()  # what the file registered is gone behind the command


def test_it_learns_reports_and_saves_an_adapter_and_resumes_to_the_same(place):
    line = arguments(
        place, "run", "--peft", "prompt[length=4]|lora[rank=2]", "--attention", "longformer[window=8]", "--epochs", "4"
    )
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    # 32 less 4 prompt tokens
    assert "54 texts to train on, 6 to evaluate on, up to 28 tokens, 2 labels: business, sport" in text
    assert "the weights start at random" in text and "accuracy 1 " in text and "prompt embed.token 1 site 64" in text
    assert (place / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "run/adapter/adapter.json").is_file()

    repeated = CliRunner().invoke(app, line)
    assert repeated.exit_code == 2 and "resume" in repeated.output and "Traceback" not in repeated.output
    before = {p.name: p.read_bytes() for p in (place / "run/adapter").iterdir()}
    resumed = CliRunner().invoke(app, [*line, "--resume"])
    assert resumed.exit_code == 0, resumed.output
    assert before == {p.name: p.read_bytes() for p in (place / "run/adapter").iterdir()}

    torch.manual_seed(0)
    model = effzoo.build(
        str(place / "tiny.toml"), attention="longformer[window=8]", task="classification", num_labels=2
    )
    effzoo.load_adapter(model, place / "run/adapter")
    assert effzoo.account(model).trainable > 0


def test_all_weights_and_language_models_train_too(place):
    done = CliRunner().invoke(app, arguments(place, "all", "--peft", "none", "--task", "masked_lm", "--epochs", "1"))
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output and (place / "all/model.safetensors").is_file()


def test_a_saved_model_is_trained_further(place):
    done = CliRunner().invoke(app, arguments(place, "all", "--peft", "none", "--epochs", "1"))
    assert done.exit_code == 0, done.output
    assert effzoo.load(place / "all").label_names == ("business", "sport")
    line = arguments(place, "more", "--epochs", "1")[:-2]
    given = [place / "all" if word == str(place / "tiny.toml") else word for word in line if word != "--tokenizer"]
    given = [str(word) for word in given if word != str(place / "words")]  # the folder holds it
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert "at random" not in done.output and (place / "more/adapter/adapter.json").is_file()


def test_evaluation_texts_take_the_labels_of_the_training_texts(place):
    (place / "test.jsonl").write_text('{"text": "goal", "label": "sport"}\n{"text": "match", "label": "sport"}')
    news, options = str(place / "news.jsonl"), Options.of(None, None, None, None)
    train, held_out = _parts(
        load_text(news), news, "classification", None, str(place / "test.jsonl"), None, 0.1, 0, options
    )
    assert len(train) == 60 and names(held_out) == ["business", "sport"] and held_out["label"] == [1, 1]
    (place / "other.jsonl").write_text('{"text": "rain", "label": "weather"}\n{"text": "goal", "label": "sport"}')
    with pytest.raises(DataError, match="weather"):
        _parts(load_text(news), news, "classification", None, str(place / "other.jsonl"), None, 0.1, 0, options)


def test_a_full_model_teaches_one_with_efficient_attention(place):
    done = CliRunner().invoke(app, arguments(place, "full", "--epochs", "1"))
    assert done.exit_code == 0, done.output
    line = arguments(place, "local", "--epochs", "1", "--attention", "local[chunk=8]", "--teacher", str(place / "full"))
    done = CliRunner().invoke(app, [*line, "--distillation", "logits=1, hidden=1, temperature=4"])
    assert done.exit_code == 0, done.output
    lonely = CliRunner().invoke(app, arguments(place, "alone", "--distillation", "hidden=1"))
    assert lonely.exit_code == 2 and "give --teacher" in " ".join(lonely.output.split())
    empty = CliRunner().invoke(app, arguments(place, "alone", "--teacher", str(place / "words")))
    assert empty.exit_code == 2 and "finished run" in " ".join(empty.output.split())
