"""What generates texts in the lab: meanings from files and from the grammar, small decoders, and scores by hand."""

import math
from collections import Counter

import pytest
import torch

from effzoo.errors import DataError, InputError
from effzoo.lab import Run
from effzoo.lab.analyses.text_scores import bleu, rouge_l, slots_said
from effzoo.lab.decoders import END, PAD, UNKNOWN, Vocabulary, batch, decoder, documents, pairs, stream, write
from effzoo.lab.meanings import PHRASES, Meaning, meanings, read_meanings, restaurants, words

TEXTS = ["the old mill is a pub by the river .", "blue door serves thai food near the town hall in town"]
REFERENCES = [
    ["the old mill is a pub near the river .", "by the river there is the old mill , a pub .", "a pub by the river ."],
    ["blue door is a cafe that serves thai food near the town hall ."],
]


def grams(text, n):
    split = text.split()
    return Counter(tuple(split[i : i + n]) for i in range(len(split) - n + 1))


def test_bleu_is_the_mean_of_clipped_precisions_times_the_brevity_penalty():
    logs = []
    for n in range(1, 5):
        right = sum(
            min(count, max(grams(reference, n)[gram] for reference in many))
            for text, many in zip(TEXTS, REFERENCES, strict=True)
            for gram, count in grams(text, n).items()
        )
        logs.append(math.log(right / sum(grams(text, n).total() for text in TEXTS)))
    length, nearest = 0, 0
    for text, many in zip(TEXTS, REFERENCES, strict=True):
        size = len(text.split())
        length += size
        nearest += min((len(reference.split()) for reference in many), key=lambda n: (abs(n - size), n))
    assert nearest > length  # so that the penalty counts
    assert bleu(TEXTS, REFERENCES) == pytest.approx(100 * math.exp(sum(logs) / 4 + 1 - nearest / length))
    assert bleu(["a b c d e"], [["x y", "a b c d e"]]) == pytest.approx(100)


def subsequence(a, b):
    """The length of the longest common subsequence."""
    best = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            best[i + 1][j + 1] = best[i][j] + 1 if x == y else max(best[i][j + 1], best[i + 1][j])
    return best[-1][-1]


def test_rouge_l_is_f_of_the_longest_common_subsequence_with_the_best_reference():
    scores = []
    for text, many in zip(TEXTS, REFERENCES, strict=True):
        of_text = []
        for reference in many:
            a, b = ([word for word in line.split() if word.isalnum()] for line in (text, reference))
            precision, recall = (subsequence(a, b) / len(x) for x in (a, b))
            of_text.append(2 * precision * recall / (precision + recall))
        scores.append(max(of_text))
    assert rouge_l(TEXTS, REFERENCES) == pytest.approx(100 * sum(scores) / 2)


def test_scores_want_references_and_their_packages(monkeypatch):
    for texts, references in ((["a"], []), (["a"], [[]]), ([], [])):
        with pytest.raises(InputError, match="one reference or more"):
            bleu(texts, references)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for score, package in ((bleu, "sacrebleu"), (rouge_l, "rouge_score")):
        with pytest.raises(DataError, match=f"{package}, which is not installed"):
            score(["a"], [["a"]])


def test_slots_are_said_as_they_are_or_in_a_phrase_of_the_grammar():
    meaning = Meaning((("name", "Blue Door"), ("price", "low"), ("area", "river"), ("near", "Fish Market")), ("",))
    texts = [
        "blue door is a pub at low prices , by the river .",
        "the blue doors are down by the water near fish market .",
    ]
    assert slots_said(texts[:1], [meaning]) == 75 and slots_said(texts[1:], [meaning]) == 50
    assert slots_said(texts, [meaning, meaning]) == 62.5
    known = restaurants(20)
    assert slots_said([" ".join(words(one.references[2])) for one in known], known) == 100
    with pytest.raises(InputError, match="2 texts and 1 meanings"):
        slots_said(texts, [meaning])


def test_meanings_are_read_from_files_with_all_texts_of_one(tmp_path):
    (tmp_path / "a.csv").write_text('\ufeffmr,ref\n"name[Blue Door], familyFriendly[yes]","Take ""them"", all."\n')
    (tmp_path / "b.csv").write_text('"mr","ref"\n"name[X]",One.\n"name[Blue Door], familyFriendly[yes]",Two.\n')
    (tmp_path / "c.csv").write_text("text,label\nno,1\n")
    found = read_meanings(tmp_path)
    slots = (("name", "Blue Door"), ("family friendly", "yes"))
    assert found == [Meaning(slots, ('Take "them", all.', "Two.")), Meaning((("name", "X"),), ("One.",))]
    assert found[0].line == "name : Blue Door | family friendly : yes"
    assert read_meanings(tmp_path / "b.csv")[0].references == ("One.",)
    everything, about = meanings(Run(data=tmp_path), 99)
    assert set(everything) == set(found) and about == tmp_path.name
    with pytest.raises(DataError, match="no CSV file with rows of mr and ref"):
        read_meanings(tmp_path / "c.csv")


def test_texts_of_the_grammar_say_every_slot():
    found = restaurants(60)
    assert len({meaning.slots for meaning in found}) == 60 and found == restaurants(60) != restaurants(60, seed=1)
    for meaning in found:
        for text in meaning.references:
            for name, value in meaning.slots:
                assert any(said in text for said in PHRASES.get((name, value), (value,))), (text, name)
    drawn, about = meanings(Run(), 60)
    assert set(drawn) == set(found) and drawn != found and about == "a grammar of restaurants"


def test_documents_have_texts_alone_and_pairs_learn_the_text_alone():
    known = restaurants(20)
    vocabulary = Vocabulary(known)
    assert words("Family-friendly, £20!") == ["family", "-", "friendly", ",", "£", "20", "!"]
    text = known[0].references[0]
    ids = vocabulary.encode(text)
    assert ids[-1] == END and vocabulary.decode([*ids, 5, 6]) == " ".join(words(text))
    assert vocabulary.encode("zeppelin") == [UNKNOWN, END]
    assert vocabulary.encode(known[0].line).count(UNKNOWN) == 0
    short = Meaning((("name", "x"),), tuple(f"{word} ." for word in ("a", "is", "the", "there", "cafe", "pub")))
    told = documents(vocabulary, [short])
    assert [len(ids) for ids, _ in told] == [12, 6] and all(first == 0 for _, first in told)
    apart = [ids[i : i + 3] for ids, _ in told for i in range(0, len(ids), 3)]
    assert sorted(apart) == sorted(vocabulary.encode(text) for text in short.references)
    (line, first), *rest = pairs(vocabulary, known[:1])
    assert len(rest) == 5 and line[:first] == vocabulary.encode(known[0].line) and line[first:] == ids
    made = batch([(line, first), ([7, 8, END], 1)])
    assert made["labels"][0].tolist() == [-100] * first + ids
    assert made["input_ids"][1].tolist() == [7, 8, END] + [PAD] * (len(line) - 3)
    assert made["labels"][1].tolist() == [-100, 8, END] + [-100] * (len(line) - 3)
    assert made["attention_mask"].sum(dim=1).tolist() == [len(line), 3]
    sequences = [([i], 0) for i in range(3, 9)]
    batches = stream(sequences, 3, seed=0)
    seen = [next(batches)["input_ids"].flatten().tolist() for _ in range(2)]
    assert sorted(i for ids in seen for i in ids) == list(range(3, 9))


def test_what_is_written_is_the_likeliest_word_again_and_again():
    known = restaurants(12)
    vocabulary = Vocabulary(known)
    model = decoder(vocabulary, dim=16, layers=2, seed=3).eval()
    written = write(model, vocabulary, known[:3])
    assert len({len(vocabulary.encode(meaning.line)) for meaning in known[:3]}) > 1  # so that some have padding
    for meaning, text in zip(known[:3], written, strict=True):
        ids = vocabulary.encode(meaning.line)
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 45 and (len(ids) == start or ids[-1] != END):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == vocabulary.decode(ids[start:])
