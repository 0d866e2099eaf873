"""Questions with contexts: `load_questions`, windows over long contexts, answers (`answers_of`), exact match and F1."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from effzoo.annotations import Count
from effzoo.checked import IGNORED
from effzoo.data.files import Reading, decoded, suffix_of
from effzoo.data.sources import chosen, opened
from effzoo.data.texts import check_offsets, check_table
from effzoo.errors import DataError, listing, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("id", "question", "context", "answers")


def load_questions(
    source: str | Path, *, part: str | None = None, subset: str | None = None, encoding: str | Sequence[str] = "utf-8"
) -> Dataset:
    """A table of questions: `id`, `question`, `context` and, where there are some, `answers` (`text`, `answer_start`).

    source: SQuAD's .json, a .jsonl or .parquet file with these columns, a folder of such files, or a data set on the
        hub. An answer is a text and the number of its first character in the context; a question without answers has
        empty lists.
    part, subset, encoding: as in `load_text`.

    Raises DataError for missing columns, and for an answer that does not stand where it is said to.
    """
    encodings = (encoding,) if isinstance(encoding, str) else tuple(encoding)
    path = Path(source)
    rows = _of_squad(path, encodings) if path.is_file() and suffix_of(path) == ".json" else None
    if rows is None:
        table = chosen(opened(source, subset, Reading(encodings)), part, source)
        missing = [name for name in ("question", "context") if name not in table.column_names]
        if missing:
            raise DataError(
                f"{source} has no column {missing[0]!r}; questions have {listing(COLUMNS)}. Columns: "
                f"{listing(table.column_names)}."
            )
        rows = [_flat(row, number) for number, row in enumerate(table)]
    return _checked(rows, source)


def _of_squad(path: Path, encodings: Sequence[str]) -> list[dict[str, Any]] | None:
    """The questions of SQuAD's nested JSON; None for another."""
    try:
        content = json.loads(decoded(path, encodings))
    except (ValueError, RecursionError):
        return None  # the reader of .json says what is wrong
    articles = content.get("data") if isinstance(content, dict) else None
    if not isinstance(articles, list) or not any(isinstance(a, dict) and "paragraphs" in a for a in articles):
        return None
    rows: list[dict[str, Any]] = []
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = asked.get("answers", [] if asked.get("is_impossible") else None)
                    if answers and asked.get("is_impossible"):
                        raise DataError(
                            f"{path}: question {asked.get('id', len(rows))} is_impossible and has the answer "
                            f"{shown(answers[0], 60)}; leave one out"
                        )
                    found = (
                        None
                        if answers is None
                        else {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
                    )
                    row = {"id": str(asked.get("id", len(rows))), "question": asked["question"]}
                    rows.append(row | {"context": paragraph["context"], "answers": found})
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: after {len(rows)} questions, {type(error).__name__}: {error}; SQuAD has data, paragraphs with "
            "context and qas, and of each question, id, answers with text and answer_start"
        ) from None
    return rows


def _flat(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    answers = row.get("answers")
    if isinstance(answers, list) and all(
        isinstance(answer, dict) for answer in answers
    ):  # of answers, not of their columns
        answers = {name: [answer.get(name) for answer in answers] for name in ("text", "answer_start")}
    if answers is not None and not (isinstance(answers, dict) and {"text", "answer_start"} <= {*answers}):
        raise DataError(
            f"row {number}: answers are {{'text': [...], 'answer_start': [...]}}, or a list of answers with these two, "
            f"got {shown(answers, 60)}"
        )
    given = row.get("id")
    found = None if answers is None else {name: list(answers[name]) for name in ("text", "answer_start")}
    return {
        "id": str(number if given is None else given), "question": row["question"], "context": row["context"],
        "answers": found,
    }  # fmt: skip


def _checked(rows: list[dict[str, Any]], source: Any) -> Dataset:
    from datasets import Dataset, Features, Value
    from datasets import Sequence as Lists

    if not rows:
        raise DataError(f"{source} has no questions")
    answered = [row["answers"] is not None for row in rows]
    if any(answered) and not all(answered):
        raise DataError(f"row {answered.index(False)} has no answers and others have; give it empty lists")
    for number, row in enumerate(rows):
        for name in ("question", "context"):
            if not isinstance(row[name], str):
                raise DataError(f"column {name!r}: row {number} holds {shown(row[name], 40)}, not a text")
        pairs = row["answers"] or {"text": [], "answer_start": []}
        if len(pairs["text"]) != len(pairs["answer_start"]):
            raise DataError(f"row {number} has {len(pairs['text'])} answers and {len(pairs['answer_start'])} starts")
        for text, start in zip(pairs["text"], pairs["answer_start"], strict=True):
            if not isinstance(text, str) or type(start) is not int or not text:
                raise DataError(
                    f"row {number}: an answer is a text and the number of a character, got {shown(text, 40)}, {start!r}"
                )
            stands = row["context"][start : start + len(text)] if start >= 0 else ""
            if stands != text:
                raise DataError(
                    f"row {number} (id {row['id']}): the answer {shown(text, 40)} does not stand at character {start} "
                    f"of its context; there stands {shown(stands, 40)}"
                )
    features = {"id": Value("string"), "question": Value("string"), "context": Value("string")}
    if answered[0]:
        features["answers"] = {"text": Lists(Value("string")), "answer_start": Lists(Value("int64"))}
    columns = {name: [row[name] for row in rows] for name in features}
    return Dataset.from_dict(columns, features=Features(features))


def check_room(tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
    """Raise DataError where windows overlap whole."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    if stride >= room:
        raise DataError(f"stride {stride} leaves windows of {max_length} tokens nothing new; give a smaller one")


def windows(
    batch: Mapping[str, list[Any]], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int,
    stride: int, global_question: bool, offsets: bool,
) -> dict[str, list[Any]]:  # fmt: skip
    """Question and context as tokens, in several windows where the context is long, and the answer in each.

    A window without the whole answer has the answer [0, 0] where a sequence starts with a token that stands for all of
    it, as in BERT (section 4.3), and else no label.
    """
    extra = tokenizer.num_special_tokens_to_add(pair=True)
    for row, question in zip(rows, batch["question"], strict=True):
        length = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        if length + extra + stride >= max_length:
            raise DataError(
                f"row {row}: the question has {length} tokens, so windows of {max_length} with a stride of {stride} "
                "have no room for its context; give a larger max_length or a smaller stride"
            )
    encoded = tokenizer(
        batch["question"], batch["context"], truncation="only_second", max_length=max_length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, padding=False,
    )  # fmt: skip
    tokens = dict(encoded)
    samples, mapping = tokens.pop("overflow_to_sample_mapping"), tokens.pop("offset_mapping")
    texts = [encoded.sequence_ids(window) for window in range(len(samples))]
    places = [
        [list(span) if text == 1 else [-1, -1] for span, text in zip(spans, of_text, strict=True)]
        for spans, of_text in zip(mapping, texts, strict=True)
    ]
    if "answers" in batch:
        tokens["labels"] = [
            _label(spans, batch["answers"][sample], ids, tokenizer)
            for spans, sample, ids in zip(places, samples, tokens["input_ids"], strict=True)
        ]
    if global_question:
        tokens["global_attention_mask"] = [[int(text == 0 or at == 0) for at, text in enumerate(of)] for of in texts]
    if offsets:
        tokens["offset_mapping"] = places
        tokens["overflow_to_sample_mapping"] = [rows[sample] for sample in samples]
    return tokens


def _label(
    spans: Sequence[Sequence[int]], answers: Mapping[str, Any], ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The first and the last token of the first answer, in one window."""
    if answers["text"]:
        start, end = answers["answer_start"][0], answers["answer_start"][0] + len(answers["text"][0])
        inside = [at for at, (first, last) in enumerate(spans) if first >= 0 and first < end and last > start]
        if inside and spans[inside[0]][0] <= start and spans[inside[-1]][1] >= end:
            return [inside[0], inside[-1]]
    has_first = ids[0] == tokenizer.cls_token_id or (
        tokenizer.cls_token_id is None and ids[0] == tokenizer.bos_token_id
    )
    return [0, 0] if has_first else [IGNORED, IGNORED]


class Answer(NamedTuple):
    """An answer: its text, "" for none; the sum of its two logits; its first character in the context, -1 for none."""

    text: str
    score: float
    start: int


def answers_of(
    data: Dataset, tokens: Dataset, logits: Sequence[Any], *, longest: Count = 30, may_lack: bool | None = None
) -> list[Answer]:
    """The best answer to each question: the span i <= j < i + longest of a context with the largest start_i + end_j.

    It is the largest over all windows. Where a question may lack an answer, the text is "" if start_0 + end_0 is
    larger in every window.

    data: questions, as `load_questions` gives them.
    tokens: `tokenise(data, ..., task="question_answering", offsets=True)`.
    logits: [tokens, 2] of each window, as `effzoo.predict` gives them.
    longest: tokens of an answer.
    may_lack: None: where a question of `data` has no answers.

    Devlin et al. 2019, BERT, arXiv:1810.04805, sections 4.2 and 4.3.
    """
    check_table(data)
    check_offsets(tokens, len(logits))
    if may_lack is None:
        may_lack = "answers" in data.column_names and not all(answers["text"] for answers in data["answers"])
    best: list[Answer | None] = [None] * len(data)
    none = np.full(len(data), np.inf)
    contexts = data["context"]
    samples, mapping = tokens["overflow_to_sample_mapping"], tokens["offset_mapping"]
    for row, spans, scores in zip(samples, mapping, logits, strict=True):
        places, values = np.asarray(spans), np.asarray(scores, dtype=np.float64)[: len(spans)]
        inside = np.flatnonzero(places[:, 0] >= 0)
        none[row] = min(none[row], values[0].sum())
        if not len(inside):
            continue
        sums = values[inside, 0][:, None] + values[inside, 1][None]
        gap = np.arange(len(inside))[None] - np.arange(len(inside))[:, None]
        sums = np.where((gap >= 0) & (gap < longest), sums, -np.inf)
        first, last = np.unravel_index(sums.argmax(), sums.shape)
        score, known = float(sums[first, last]), best[row]
        if known is None or score > known.score:
            start, end = int(places[inside[first], 0]), int(places[inside[last], 1])
            best[row] = Answer(contexts[row][start:end], score, start)
    found = [Answer("", float(none[row]), -1) if answer is None else answer for row, answer in enumerate(best)]
    if not may_lack:
        return found
    return [Answer("", float(none[row]), -1) if none[row] > a.score else a for row, a in enumerate(found)]


def answer_scores(data: Dataset, answers: Sequence[str]) -> dict[str, float]:
    """exact_match and f1 of SQuAD, from 0 to 100: of each question the best over its answers, in the mean.

    Texts are compared in small letters, without punctuation and the words a, an, the. F1 is 2 n / (words of the answer
    + words of the true one), n the words that both have. Of a question without answers, both are 100 for "" and else 0.

    data: questions with answers, as `load_questions` gives them.
    answers: their texts.

    Rajpurkar et al. 2016, SQuAD, arXiv:1606.05250, section 6.1.
    """
    check_table(data)
    if "answers" not in data.column_names or len(answers) != len(data):
        raise DataError(f"answers are compared with those of as many questions, got {len(answers)} for {len(data)}")
    exact = total = 0.0
    for true, answer in zip(data["answers"], answers, strict=True):
        pairs = [(_words(text), _words(answer)) for text in true["text"] or [""]]
        exact += max(float(a == b) for a, b in pairs)
        total += max(_f1(a, b) for a, b in pairs)
    return {"exact_match": 100 * exact / len(answers), "f1": 100 * total / len(answers)}


def answer_metrics(data: Dataset, tokens: Dataset, *, longest: Count = 30) -> Callable[[Any], dict[str, float]]:
    """`metrics` for `effzoo.finetune`: `answer_scores` of `answers_of`.

    data, tokens, longest: as in `answers_of`; the evaluation reads `tokens` without the two columns of `offsets`.
    """

    check_table(data)
    check_table(tokens)

    def metrics(prediction: Any) -> dict[str, float]:
        return answer_scores(
            data, [answer.text for answer in answers_of(data, tokens, prediction.predictions, longest=longest)]
        )

    return metrics


def _words(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(true: list[str], found: list[str]) -> float:
    if not true or not found:
        return float(true == found)
    both = sum((Counter(true) & Counter(found)).values())
    return 2 * both / (len(true) + len(found))
