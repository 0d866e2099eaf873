"""Words with tags: `load_tags`, their tokens, the tags that a model gives (`tags_of`), and F1 over entities."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effzoo.checked import IGNORED
from effzoo.data.files import Reading
from effzoo.data.sources import chosen, opened
from effzoo.data.texts import check_offsets, check_table, class_names, pick
from effzoo.errors import DataError, listing, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

WORDS = ("words", "tokens", "word", "text", "sentence", "form")
TAGS = ("tags", "ner_tags", "labels", "label", "pos_tags", "upos", "ner", "tag", "chunk_tags")
_PREFIXED = re.compile(r"([BIESLU])-(.+)")
Entity = tuple[str, int, int]


def load_tags(
    source: str | Path,
    *,
    part: str | None = None,
    words: str | None = None,
    tags: str | None = None,
    subset: str | None = None,
    encoding: str | Sequence[str] = "utf-8",
    format: str | None = None,
) -> Dataset:
    """A table of sentences: `words`, a list of texts, and `tags`, one for each word.

    Tags become integers whose names `names(data)` lists: "O" first, then sorted. A source without tags gives words
    alone, and a text is divided at its spaces.

    source: a CoNLL file (.conll, .bio, .iob2: a word and its tags a line, the last one counts; .conllu: parts of
        speech), a .jsonl, .json or .parquet file with two columns of lists, a folder of such files, or a data set on
        the hub.
    part, subset, encoding: as in `load_text`.
    words, tags: names of columns; None takes a usual name that is there.
    format: where the file's name does not say it: "conll".

    Raises DataError with the line or the row that does not fit.
    """
    from datasets import ClassLabel
    from datasets import Sequence as Lists

    encodings = (encoding,) if isinstance(encoding, str) else tuple(encoding)
    table = chosen(opened(source, subset, Reading(encodings, format)), part, source)
    column, target = pick(table, words, WORDS, "words"), pick(table, tags, TAGS, "tags", required=False)
    target = None if target == column else target
    table = table.select_columns([name for name in (column, target) if name])
    table = table.rename_columns(
        {name: new for name, new in ((column, "words"), (target, "tags")) if name and name != new}
    )
    if isinstance(table[0]["words"], str):
        if target is not None and not isinstance(table[0]["tags"], list):
            target, table = None, table.remove_columns("tags")
        table = table.map(_divided, desc="Dividing at spaces")
    for row, sentence in enumerate(table["words"]):
        if not isinstance(sentence, list) or not all(isinstance(word, str) for word in sentence):
            raise DataError(f"column {column!r}: row {row} holds {shown(sentence, 60)}, not a list of words")
    if target is None:
        return table
    values, feature = list(table["tags"]), table.features["tags"]
    for row, (sentence, found) in enumerate(zip(table["words"], values, strict=True)):
        if not isinstance(found, list) or len(found) != len(sentence):
            had = len(found) if isinstance(found, list) else shown(found, 40)
            raise DataError(f"row {row} has {len(sentence)} words in {column!r} and {had} tags in {target!r}")
        if any(tag is None for tag in found):
            raise DataError(f"column {target!r}: row {row} has a word without a tag")
    if getattr(getattr(feature, "feature", None), "names", None):
        return table
    known = class_names([tag for found in values for tag in found])
    known = [tag for tag in known if tag == "O"] + [tag for tag in known if tag != "O"]
    number = {tag: index for index, tag in enumerate(known)}
    kind = Lists(ClassLabel(names=[str(tag) for tag in known]))
    return table.remove_columns("tags").add_column(
        "tags", [[number[tag] for tag in found] for found in values], feature=kind
    )


def _divided(row: dict[str, Any]) -> dict[str, Any]:
    return {"words": row["words"].split()}


def tagged_tokens(
    batch: Mapping[str, list[Any]], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int,
    every_piece: bool, offsets: bool,
) -> dict[str, list[Any]]:  # fmt: skip
    """The tokens of words, and the label of each word at its first token (or at every one)."""
    encoded = tokenizer(batch["words"], is_split_into_words=True, truncation=True, max_length=max_length, padding=False)
    tokens, places = dict(encoded), []
    for place, row in enumerate(rows):
        found = encoded.word_ids(place)
        whole = set(range(len(batch["words"][place])))
        if len(tokens["input_ids"][place]) < max_length and (lost := whole - {*found}):
            raise DataError(
                f"row {row}: the tokenizer makes no token of the word {batch['words'][place][min(lost)]!r}; leave "
                "it out"
            )
        places.append([-1 if word is None else word for word in found])
    if "tags" in batch:
        tokens["labels"] = [
            [
                IGNORED if word < 0 or (not every_piece and before == word) else tags[word]
                for before, word in zip([-1, *words], words, strict=False)
            ]
            for words, tags in zip(places, batch["tags"], strict=True)
        ]
    if offsets:
        tokens["offset_mapping"] = [[[word, -(word < 0)] for word in words] for words in places]
        tokens["overflow_to_sample_mapping"] = list(rows)
    return tokens


def tags_of(data: Dataset, tokens: Dataset, logits: Sequence[Any], labels: Sequence[str]) -> list[list[str | None]]:
    """The tag of each word, the likeliest at its first token; None for a word that was cut off.

    data: sentences, as `load_tags` gives them.
    tokens: `tokenise(data, ..., task="token_classification", offsets=True)`.
    logits: [tokens, labels] of each row, as `effzoo.predict` gives them.
    labels: the names of the tags.
    """
    check_table(data)
    check_offsets(tokens, len(logits))
    found: list[list[str | None]] = [[None] * len(sentence) for sentence in data["words"]]
    for row, places, scores in zip(tokens["overflow_to_sample_mapping"], tokens["offset_mapping"], logits, strict=True):
        for (word, _), best in zip(places, np.asarray(scores).argmax(-1).tolist(), strict=True):
            if word >= 0 and found[row][word] is None:
                found[row][word] = labels[best]
    return found


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sentence: (kind, first word, last word).

    A tag is O, or a prefix and a kind. B, S and U begin an entity; any other begins one where the tag before is O, is
    of another kind, or ended its entity (E, L, S, U). That reads IOB1, IOB2, IOBES and BILOU.

    tags: of the words. Raises DataError for a tag without a prefix.
    """
    found: list[Entity] = []
    kind, ended = "", True
    for place, tag in enumerate(tags):
        if tag == "O":
            kind, ended = "", True
            continue
        match = _PREFIXED.fullmatch(tag)
        if match is None:
            raise DataError(f"tag {tag!r} is neither O nor a prefix of B, I, E, S, L, U with a kind, such as B-PER")
        prefix = match[1]
        if prefix in "BSU" or ended or match[2] != kind:
            found.append((match[2], place, place))
        else:
            found[-1] = (kind, found[-1][1], place)
        kind, ended = match[2], prefix in "ESLU"
    return found


def entity_scores(tags: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """precision = hits / entities predicted, recall = hits / entities there, f1 = 2 hits / their sum; 0 for 0 / 0.

    A hit has the same kind, first and last word (Tjong Kim Sang and De Meulder 2003, CoNLL, section 2.3).

    tags, predicted: of each sentence, as names. Raises DataError for sentences of unequal length.
    """
    hits = there = given = 0
    if len(tags) != len(predicted):
        raise DataError(f"{len(tags)} sentences have tags, {len(predicted)} predictions")
    for row, (true, found) in enumerate(zip(tags, predicted, strict=True)):
        if len(true) != len(found):
            raise DataError(f"sentence {row} has {len(true)} tags and {len(found)} predictions")
        ours, theirs = {*entities(true)}, {*entities(found)}
        hits, there, given = hits + len(ours & theirs), there + len(ours), given + len(theirs)
    return {
        "precision": hits / given if given else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (there + given) if there + given else 0.0,
    }


def has_entities(labels: Sequence[str]) -> bool:
    """Whether the names of tags are O and prefixes with kinds."""
    return all(label == "O" or _PREFIXED.fullmatch(label) for label in labels) and any(label != "O" for label in labels)


def entity_metrics(labels: Sequence[str]) -> Callable[[Any], dict[str, float]]:
    """`metrics` for `effzoo.finetune`: `entity_scores` over the tokens whose label counts.

    labels: the names of the tags. Raises DataError for names without prefixes.
    """
    if not has_entities(labels):
        raise DataError(f"tags of entities are O and B-X, I-X, ..., got {listing(labels)}")

    def metrics(prediction: Any) -> dict[str, float]:
        best, counts = prediction.predictions.argmax(-1), prediction.label_ids != IGNORED
        true = [[labels[tag] for tag in row[here]] for row, here in zip(prediction.label_ids, counts, strict=True)]
        found = [[labels[tag] for tag in row[here]] for row, here in zip(best, counts, strict=True)]
        return entity_scores(true, found)

    return metrics
