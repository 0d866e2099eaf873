"""Words with tags, questions and conversations: formats, tokens by hand, scores by definition, and broken data."""

import itertools
import json
import random
from collections import Counter

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import EvalPrediction, PreTrainedTokenizerFast

from effzoo.data import (
    answer_metrics,
    answer_scores,
    answers_of,
    entities,
    entity_metrics,
    entity_scores,
    load_chat,
    load_questions,
    load_tags,
    load_text,
    names,
    tags_of,
    tokenise,
)
from effzoo.errors import DataError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "new", "york", "jo", "##hn", "##s", "in", "who", "is", ".", "?"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    datasets.disable_progress_bars()


def pieces():
    """A small WordPiece tokenizer as BERT has it."""
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **special)


def letters(**more):
    """Every character is a token."""
    made = Tokenizer(
        models.WordLevel({chr(code): code - 31 for code in range(32, 127)} | {"[PAD]": 0, "\n": 96}, unk_token="[PAD]")
    )
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", **more)


CONLL = """-DOCSTART- -X- O O

John NNP I-NP B-PER
's POS B-NP O

New NNP I-NP B-LOC
York NNP I-NP I-LOC
# NN I-NP O
"""


def tagged(tmp_path, how):
    if how == "conll":
        (tmp_path / "a.conll").write_text(CONLL)
        return tmp_path / "a.conll"
    rows = [(["John", "'s"], ["B-PER", "O"]), (["New", "York", "#"], ["B-LOC", "I-LOC", "O"])]
    if how == "jsonl":
        lines = [json.dumps({"tokens": words, "ner_tags": tags}) for words, tags in rows]
        (tmp_path / "a.jsonl").write_text("\n".join(lines))
        return tmp_path / "a.jsonl"
    known = ["O", "B-LOC", "B-PER", "I-LOC"]
    kind = datasets.Sequence(datasets.ClassLabel(names=known))
    features = datasets.Features({"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": kind})
    columns = {
        "tokens": [words for words, _ in rows],
        "ner_tags": [[known.index(tag) for tag in tags] for _, tags in rows],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "a.parquet")
    return tmp_path / "a.parquet"


@pytest.mark.parametrize("how", ["conll", "jsonl", "parquet"])
def test_words_and_tags_are_the_same_from_each_format(tmp_path, how):
    data = load_tags(tagged(tmp_path, how))
    assert data["words"][:] == [["John", "'s"], ["New", "York", "#"]]
    assert names(data) == ["O", "B-LOC", "B-PER", "I-LOC"] and data["tags"][:] == [[2, 0], [1, 3, 0]]


def test_conllu_and_texts_without_tags(tmp_path):
    line = "{}\t{}\t_\t{}\t_\t_\t_\t_\t_\t_\n".format
    (tmp_path / "a.conllu").write_text(
        "# text = John is\n" + line("1-2", "Johnis", "_") + line(1, "John", "PROPN") + line(2, "is", "AUX")
    )
    data = load_tags(tmp_path / "a.conllu")
    assert data["words"][:] == [["John", "is"]] and names(data) == ["AUX", "PROPN"]
    (tmp_path / "a.txt").write_text("John is  in New York\n")
    data = load_tags(tmp_path / "a.txt")
    assert data["words"][:] == [["John", "is", "in", "New", "York"]] and "tags" not in data.column_names
    (tmp_path / "bad.conllu").write_text("1\tJohn\n")
    with pytest.raises(DataError, match=r"bad\.conllu, line 1: 2 fields, and CoNLL-U has 10"):
        load_tags(tmp_path / "bad.conllu")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.conll", "John B-PER\nruns\n", r"a\.conll, line 2: 1 field, and the lines before have 2"),
        ("a.conll", "John\n", r"a\.conll, line 1: 1 field, and a line is a word and its tags"),
        ("a.conll", "\n\n", "a.conll is empty"),
        ("a.jsonl", '{"words": ["a", "b"], "tags": ["O"]}', "row 0 has 2 words in 'words' and 1 tags in 'tags'"),
        ("a.jsonl", '{"words": ["a", 3], "tags": ["O", "O"]}', "holds str in row|mixed|column 'words'"),
        ("a.jsonl", '{"words": ["a"], "tags": [null]}', "column 'tags': row 0 has a word without a tag"),
        ("a.jsonl", '{"w": ["a"]}', "none of the columns w has a usual name for words; name it with words="),
    ],
)
def test_broken_tags_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tags(tmp_path / name)


def test_the_first_piece_of_a_word_has_its_tag(tmp_path):
    data = datasets.Dataset.from_dict({"words": [["Johns", "in", "New", "York"], ["in"]], "tags": [[1, 0, 2, 3], [0]]})
    tokens = tokenise(data, pieces(), 16, task="token_classification", offsets=True)
    assert tokens["input_ids"][0] == [2, 7, 8, 9, 10, 5, 6, 3]  # [CLS] jo ##hn ##s in new york [SEP]
    assert tokens["labels"][:] == [[-100, 1, -100, -100, 0, 2, 3, -100], [-100, 0, -100]]
    assert tokens["offset_mapping"][1] == [[-1, -1], [0, 0], [-1, -1]]
    every = tokenise(data, pieces(), 16, task="token_classification", every_piece=True)
    assert every["labels"][0] == [-100, 1, 1, 1, 0, 2, 3, -100]
    cut = tokenise(data, pieces(), 6, task="token_classification", offsets=True)
    assert cut["labels"][0] == [-100, 1, -100, -100, 0, -100]
    logits = [np.eye(4)[[3, 1, 2, 2, 0, 1]], np.eye(4)[[0, 3, 0]]]
    assert tags_of(data, cut, logits, ["O", "A", "B", "C"]) == [["A", "O", None, None], ["C"]]
    assert "labels" not in tokenise(data.remove_columns("tags"), pieces(), 16, task="token_classification").column_names
    odd = datasets.Dataset.from_dict({"words": [["in", "\u200b"]], "tags": [[0, 1]]})
    with pytest.raises(DataError, match="row 0: the tokenizer makes no token of the word"):
        tokenise(odd, pieces(), 16, task="token_classification")
    with pytest.raises(DataError, match=r"tokens are tokenise\(..., offsets=True\)"):
        tags_of(data, every, logits, ["O"])


def chunks(tags):
    """The definition of conlleval in another form: a boundary between every two tags is decided alone."""

    def parts(tag):
        return (tag[0], tag[2:]) if tag != "O" else ("O", "")

    def starts(before, now):
        (p, k), (q, m) = parts(before), parts(now)
        return q != "O" and (q in "BSU" or p in "OESLU" or k != m)

    found = []
    for place, tag in enumerate(tags):
        if starts(tags[place - 1] if place else "O", tag):
            end = place
            while end + 1 < len(tags) and tags[end + 1] != "O" and not starts(tags[end], tags[end + 1]):
                end += 1
            found.append((parts(tag)[1], place, end))
    return found


def test_entities_are_those_of_the_definition():
    assert entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER"]) == [
        ("PER", 0, 1), ("LOC", 3, 3), ("LOC", 4, 4), ("PER", 5, 5)
    ]  # fmt: skip
    for tags in itertools.product(["O", "B-X", "I-X", "E-X", "S-X", "I-Y"], repeat=4):
        assert entities(tags) == chunks(tags), tags
    with pytest.raises(DataError, match="tag 'NOUN' is neither O nor a prefix"):
        entities(["NOUN"])


def drawn(seed, kinds="BIO"):
    draw = random.Random(seed)
    tags = ["O", *(f"{prefix}-{kind}" for prefix in kinds.replace("O", "") for kind in ("PER", "LOC"))]
    lengths = [draw.randrange(1, 9) for _ in range(12)]
    return [[[draw.choice(tags) for _ in range(length)] for length in lengths] for _ in range(2)]


@pytest.mark.parametrize("kinds", ["BIO", "BIOES"])
def test_entity_scores_are_those_of_seqeval(kinds):
    import seqeval.metrics as seqeval

    for seed in range(40):
        true, found = drawn(seed, kinds)
        found = [a if seed % 3 else b for a, b in zip(true, found, strict=True)] if seed % 2 else found
        scores = entity_scores(true, found)
        for name in ("precision", "recall", "f1"):
            assert scores[name] == pytest.approx(getattr(seqeval, f"{name}_score")(true, found), abs=1e-12), (
                seed,
                name,
            )


def test_entity_scores_count_hits_and_metrics_read_what_counts():
    true, found = [["B-A", "I-A", "O", "B-B"]], [["B-A", "I-A", "O", "B-A"]]
    assert entity_scores(true, found) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    labels = ["O", "B-A", "I-A", "B-B"]
    label_ids = np.array([[-100, 1, 2, -100, 0, 3, -100]])
    logits = np.eye(4)[[[0, 1, 2, 3, 0, 1, 2]]]
    assert entity_metrics(labels)(EvalPrediction(logits, label_ids)) == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    with pytest.raises(DataError, match="tags of entities are O and B-X, I-X, ..., got NOUN"):
        entity_metrics(["NOUN"])


# --- questions

CONTEXT = "john is in new york ."
SQUAD = {
    "version": "1.1",
    "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": [
        {"id": "q1", "question": "who is in ?", "answers": [{"text": "john", "answer_start": 0}]},
        {"id": "q2", "question": "is in ?", "answers": [
            {"text": "new york", "answer_start": 11}, {"text": "york", "answer_start": 15}]},
        {"id": "q3", "question": "who ?", "is_impossible": True, "answers": []},
    ]}]}],
}  # fmt: skip


def flat():
    return [
        {"id": asked["id"], "question": asked["question"], "context": CONTEXT, "answers": {
            name: [answer[name] for answer in asked["answers"]] for name in ("text", "answer_start")
        }}
        for asked in SQUAD["data"][0]["paragraphs"][0]["qas"]
    ]  # fmt: skip


def asked(tmp_path, how="json"):
    if how == "json":
        (tmp_path / "q.json").write_text(json.dumps(SQUAD))
    elif how == "parquet":
        datasets.Dataset.from_list(flat()).to_parquet(tmp_path / "q.parquet")
    else:
        rows = flat()
        if how == "jsonl.gz":
            how = "jsonl"
            rows = [
                row
                | {
                    "answers": [
                        dict(zip(row["answers"], pair, strict=True))
                        for pair in zip(*row["answers"].values(), strict=True)
                    ]
                }
                for row in rows
            ]
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / f"q.{how}"


@pytest.mark.parametrize("how", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_questions_are_the_same_from_each_format(tmp_path, how):
    assert load_questions(asked(tmp_path, how))[:] == datasets.Dataset.from_list(flat())[:]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": {"text": ["york"], "answer_start": [14]}},
         r"row 0 \(id q1\): the answer 'york' does not stand at character 14 of its context; there stands ' yor'"),
        ({"answers": {"text": ["york"], "answer_start": [-5]}}, "there stands ''"),
        ({"answers": {"text": ["york"], "answer_start": []}}, "row 0 has 1 answers and 0 starts"),
        ({"answers": ["york"]}, r"row 0: answers are .* got \['york'\]"),
        ({"question": 3}, "column 'question': row 0 holds 3, not a text"),
    ],
)  # fmt: skip
def test_broken_questions_are_named(tmp_path, row, message):
    (tmp_path / "q.jsonl").write_text(json.dumps(flat()[0] | row))
    with pytest.raises(DataError, match=message):
        load_questions(tmp_path / "q.jsonl")


def test_questions_without_columns_and_half_answered_files(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "who ?"}')
    with pytest.raises(DataError, match="has no column 'context'; questions have id, question, context, answers"):
        load_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.json").write_text('{"data": [{"paragraphs": [{"qas": []}, {"qas": [{}]}]}]}')
    with pytest.raises(DataError, match="after 0 questions, KeyError: 'question'; SQuAD has data, paragraphs"):
        load_questions(tmp_path / "q.json")
    (tmp_path / "q.jsonl").write_text(
        "\n".join(
            json.dumps({"question": "who ?", "context": "john"} | more)
            for more in ({}, {"answers": {"text": [], "answer_start": []}})
        )
    )
    with pytest.raises(DataError, match="row 0 has no answers and others have; give it empty lists"):
        load_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text('{"question": "who ?", "context": "john"}')
    assert load_questions(tmp_path / "q.jsonl").column_names == ["id", "question", "context"]


def test_windows_and_answers_by_hand(tmp_path):
    data, tokenizer = load_questions(asked(tmp_path)), pieces()
    whole = tokenise(data, tokenizer, 32, task="question_answering", offsets=True)
    # [CLS] who is in ? [SEP] jo ##hn is in new york . [SEP]
    assert whole["labels"][:] == [[6, 7], [9, 10], [0, 0]] and whole["token_type_ids"][0] == [0] * 6 + [1] * 8
    assert whole["offset_mapping"][0][5:8] == [[-1, -1], [0, 2], [2, 4]]
    one = tokenise(data, tokenizer, 11, task="question_answering", stride=2, offsets=True, global_question=True)
    first = [row for row in one if row["overflow_to_sample_mapping"] == 0]
    # room for 4 of 7 tokens of the context, two of which are shared
    assert [row["input_ids"][6:-1] for row in first] == [[7, 8, 12, 10], [12, 10, 5, 6], [5, 6, 13]]
    assert [row["labels"] for row in first] == [[6, 7], [0, 0], [0, 0]]
    assert first[2]["global_attention_mask"] == [1] * 5 + [0] * 5
    with pytest.raises(
        DataError, match="row 0: the question has 4 tokens, so windows of 8 with a stride of 2 have no room"
    ):
        tokenise(data, tokenizer, 8, task="question_answering", stride=2)
    with pytest.raises(DataError, match="stride 9 leaves windows of 11 tokens nothing new"):
        tokenise(data, tokenizer, 11, task="question_answering", stride=9)


def brute(spans, logits, context, longest):
    """Every span of every window."""
    best = (-np.inf, "")
    for places, values in zip(spans, logits, strict=True):
        for i, (first, _) in enumerate(places):
            for j in range(i, min(i + longest, len(places))):
                if first >= 0 and places[j][0] >= 0 and values[i][0] + values[j][1] > best[0]:
                    best = (values[i][0] + values[j][1], context[first : places[j][1]])
    return best


@pytest.mark.parametrize("longest", [1, 3, 30])
def test_the_best_span_over_windows_is_that_of_a_search_through_all(tmp_path, longest):
    data = load_questions(asked(tmp_path))
    tokens = tokenise(data, pieces(), 11, task="question_answering", stride=2, offsets=True)
    draw = np.random.default_rng(0)
    for _ in range(20):
        logits = [draw.normal(size=(len(ids), 2)) for ids in tokens["input_ids"]]
        padded = [np.concatenate([x, np.full((3, 2), 9.0)]) for x in logits]  # as metrics are given them
        for given in (logits, padded):
            found = answers_of(data, tokens, given, longest=longest, may_lack=False)
            lacking = answers_of(data, tokens, given, longest=longest)
            for row, answer in enumerate(found):
                mine = [at for at, sample in enumerate(tokens["overflow_to_sample_mapping"]) if sample == row]
                score, text = brute(
                    [tokens["offset_mapping"][at] for at in mine], [logits[at] for at in mine], CONTEXT, longest
                )
                assert answer.text == text and answer.score == pytest.approx(score)
                assert CONTEXT[answer.start : answer.start + len(text)] == text
                none = min(logits[at][0].sum() for at in mine)
                assert lacking[row].text == ("" if none > score else text)


def squad(prediction, truths):
    """Exact match and F1 of SQuAD, written out."""

    def normal(text):
        text = "".join(c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")
        return [word for word in text.split() if word not in ("a", "an", "the")]

    best = [0.0, 0.0]
    for truth in truths or [""]:
        a, b = normal(prediction), normal(truth)
        same = sum(min(Counter(a)[word], Counter(b)[word]) for word in {*a})
        f1 = float(a == b) if not a or not b else 2 * same / (len(a) + len(b))
        best = [max(best[0], float(a == b)), max(best[1], f1)]
    return best


def test_scores_of_answers_are_those_of_squad(tmp_path):
    data = load_questions(asked(tmp_path))
    for answers in (["The John!", "in york", ""], ["", "New York.", "john"], ["john john", "york york new", "a"]):
        want = np.mean([squad(a, row["answers"]["text"]) for a, row in zip(answers, data, strict=True)], axis=0) * 100
        scores = answer_scores(data, answers)
        assert (scores["exact_match"], scores["f1"]) == pytest.approx(tuple(want))
    assert answer_scores(data, ["the john", "york", ""]) == {"exact_match": 100.0, "f1": 100.0}
    assert answer_scores(data, ["x", "new", "an"])["f1"] == pytest.approx(100 * (0 + 2 / 3 + 1) / 3)
    tokens = tokenise(data, pieces(), 32, task="question_answering", offsets=True)
    perfect = np.zeros((3, 16, 2))
    for row, (start, end) in enumerate(tokens["labels"]):
        perfect[row, start, 0] = perfect[row, end, 1] = 9
    assert answer_metrics(data, tokens)(EvalPrediction(perfect, None)) == {"exact_match": 100.0, "f1": 100.0}
    with pytest.raises(DataError, match="got 1 for 3"):
        answer_scores(data, ["x"])


# --- conversations

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}|"
    "{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{{ '\n' }}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "so"},
    {"role": "assistant", "content": "ok."},
]  # fmt: skip
WHOLE = "<user>hi|\n<assistant>yo|\n<user>so|\n<assistant>ok.|\n"


def talk(tmp_path, rows):
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_chat(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("template", "spoken"), [(TEMPLATE, ("yo|\n", "ok.|\n")), (MARKED, ("yo|", "ok.|"))], ids=["prefixes", "marks"]
)
def test_only_what_the_assistant_says_has_labels(tmp_path, template, spoken):
    data = talk(tmp_path, [{"messages": TALK}])
    tokens = tokenise(data, letters(chat_template=template), 100, task="causal_lm")
    assert len(tokens["input_ids"][0]) == len(WHOLE) == len(tokens["labels"][0])
    mask = [False] * len(WHOLE)
    for said in spoken:  # by hand: the characters of the answers
        at = WHOLE.index(said)
        mask[at : at + len(said)] = [True] * len(said)
    ids = tokens["input_ids"][0]
    assert ids[:3] == [ord(c) - 31 for c in "<us"]
    assert tokens["labels"][0] == [token if here else -100 for token, here in zip(ids, mask, strict=True)]
    cut = tokenise(data, letters(chat_template=template), 24, task="causal_lm")
    assert cut["labels"][0] == tokens["labels"][0][:24]


def test_other_forms_of_messages_and_what_is_refused(tmp_path):
    theirs = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    data = talk(tmp_path, [{"conversations": theirs}])
    assert data["messages"][:] == [TALK[:2]]
    with pytest.raises(DataError, match="this tokenizer has no chat template"):
        tokenise(data, letters(), 100, task="causal_lm")
    with pytest.raises(DataError, match="task 'classification' needs the columns text and label; there are messages"):
        tokenise(data, letters(), 100)
    lonely = talk(tmp_path, [{"messages": TALK}, {"messages": TALK[:1]}])
    with pytest.raises(DataError, match="row 1 has no message of the role 'assistant'.* its roles are user"):
        tokenise(lonely, letters(chat_template=TEMPLATE), 100, task="causal_lm")
    last = "{% for m in messages %}{% if loop.last %}!{% endif %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(
        DataError, match=r"row 0: the chat template writes a message otherwise when others follow.*generation"
    ):
        tokenise(talk(tmp_path, [{"messages": TALK}]), letters(chat_template=last), 100, task="causal_lm")
    refuses = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="row 0: the chat template refuses these messages: .*roles must alternate"):
        tokenise(data, letters(chat_template=refuses), 100, task="causal_lm")
    for row, message in (
        ({"messages": []}, "row 0 holds .*, not a list of messages"),
        ({"messages": [{"role": "user"}]}, "row 0, message 0: .* is no"),
        ({"text": "a"}, "none of the columns text has a usual name for messages"),
    ):
        with pytest.raises(DataError, match=message):
            talk(tmp_path, [row])


# --- texts


def test_pairs_have_types_and_the_longer_text_is_cut(tmp_path):
    (tmp_path / "a.csv").write_text("premise,hypothesis,label\nin new york in new york,who is,1\n")
    data = load_text(tmp_path / "a.csv")
    tokens = tokenise(data, pieces(), 9)
    assert tokens["input_ids"][0] == [2, 10, 5, 6, 10, 3, 11, 12, 3]  # 4 of 6 and 2 of 2
    assert tokens["token_type_ids"][0] == [0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_several_labels_are_rows_of_zero_and_one_and_numbers_stay(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nin,b|a\nnew,\n")
    tokens = tokenise(load_text(tmp_path / "a.csv", label_separator="|"), pieces(), 9)
    assert tokens["labels"][:] == [[1.0, 1.0], [0.0, 0.0]]
    (tmp_path / "a.csv").write_text("text,score\nin,1\nnew,3\n")
    tokens = tokenise(load_text(tmp_path / "a.csv", label_kind="numbers"), pieces(), 9)
    assert tokens["labels"][:] == [1.0, 3.0]
    assert "labels" not in tokenise(load_text(tmp_path / "a.csv"), pieces(), 9, task="features").column_names


@pytest.mark.parametrize("task", ["causal_lm", "masked_lm"])
def test_long_plain_text_goes_on_in_further_rows(tmp_path, task):
    (tmp_path / "a.txt").write_text("in new york who is john .\nin\n")
    data = load_text(tmp_path / "a.txt")
    tokens = tokenise(data, pieces(), 5, task=task, overflow="rows")
    counted = [label for labels in tokens["labels"] for label in labels if label != -100]
    plain = tokenise(data, pieces(), 5, task="causal_lm", overflow="rows")["input_ids"][:]
    assert [len(ids) for ids in plain] == [5, 5, 4, 3]
    assert [token for ids in plain for token in ids[1:-1]] == [10, 5, 6, 11, 12, 7, 8, 13, 10], "nothing is lost"
    assert len(counted) == (17 if task == "causal_lm" else 4)
    assert len(tokenise(data, pieces(), 5, task=task)) == 2
    with pytest.raises(DataError, match="overflow is 'cut', or 'rows' for causal_lm and masked_lm"):
        tokenise(load_tags(tmp_path / "a.txt"), pieces(), 5, task="token_classification", overflow="rows")


def test_a_word_may_hold_a_space_that_does_not_break(tmp_path):
    (tmp_path / "a.conll").write_text("New\u00a0York  B-LOC\na\u2028b O \n")
    assert load_tags(tmp_path / "a.conll")["words"][0] == ["New\u00a0York", "a\u2028b"]


def test_questions_without_answers_are_not_taken_for_unanswerable_ones(tmp_path):
    def written(*asked):
        page = {"paragraphs": [{"context": "Ann lives in Rome", "qas": list(asked)}]}
        (tmp_path / "a.json").write_text(json.dumps({"data": [page]}))
        return tmp_path / "a.json"

    answer = {"text": "Rome", "answer_start": 13}
    open_one, known = {"id": "1", "question": "where ?"}, {"id": "2", "question": "where ?", "answers": [answer]}
    assert "answers" not in load_questions(written(open_one)).column_names
    with pytest.raises(DataError, match="row 0 has no answers and others have"):
        load_questions(written(open_one, known))
    lacking = {"id": "3", "question": "who ?", "is_impossible": True}
    assert load_questions(written(lacking, known))["answers"][0] == {"text": [], "answer_start": []}
    with pytest.raises(DataError, match="question 2 is_impossible and has the answer"):
        load_questions(written(known | {"is_impossible": True}))


@pytest.mark.parametrize("more", [{"tool_calls": [{"function": {"name": "f"}}]}, {"weight": 0}])
def test_parts_of_a_message_that_would_be_lost_are_refused(tmp_path, more):
    def written(message):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, message]}))
        return tmp_path / "a.jsonl"

    said = {"role": "assistant", "content": "b"}
    assert load_chat(written(said | {"weight": 1, "tool_calls": None}))["messages"][0][1] == said
    with pytest.raises(DataError, match=f"row 0, message 1 has {next(iter(more))}=.* which is not read here"):
        load_chat(written(said | more))
