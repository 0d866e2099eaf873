"""How near texts are to several references each: BLEU and ROUGE-L, computed by sacrebleu and rouge-score; and how much
of their meanings they say."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from statistics import mean

from effzoo.errors import DataError, InputError
from effzoo.lab.meanings import PHRASES, Meaning, words


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of up to four words, in percent: the geometric mean of the shares of n-grams that stand in one of the
    references, times exp(1 - r / c) where the texts, c words, are shorter than the references nearest in length, r.

    texts: words and marks with spaces between them.
    references: of each text, one or more, in the same form.

    Raises DataError without sacrebleu.
    """
    _check(texts, references, "sacrebleu")
    import sacrebleu

    most = max(map(len, references))
    # the first once more where there are fewer, which changes nothing
    columns = [[many[i] if i < len(many) else many[0] for many in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(texts), columns, tokenize="none", force=True).score)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L in percent: F of the longest common subsequence, with the reference that gives most of it.

    texts, references: as of `bleu`; marks do not count.

    Raises DataError without rouge-score.
    """
    _check(texts, references, "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = (scorer.score_multi(list(many), text) for text, many in zip(texts, references, strict=True))
    return 100 * mean(score["rougeL"].fmeasure for score in scores)


def slots_said(texts: Sequence[str], meanings: Sequence[Meaning]) -> float:
    """The share of slots in percent whose value stands in the text, as it is or in a phrase of the grammar.

    texts: as of `bleu`, one for each meaning. What a text says beside is not counted.
    """
    if not texts or len(texts) != len(meanings):
        raise InputError(f"each text has its meaning, got {len(texts)} texts and {len(meanings)} meanings")
    found = [
        any(f" {' '.join(words(said))} " in f" {text} " for said in (slot[1], *PHRASES.get(slot, ())))
        for text, meaning in zip(texts, meanings, strict=True)
        for slot in meaning.slots
    ]
    return 100 * mean(found)


def _check(texts: Sequence[str], references: Sequence[Sequence[str]], package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"scores of texts are computed by {package}, which is not installed: pip install 'effzoo[demo]'"
        )
    if not texts or len(texts) != len(references) or not all(references):
        raise InputError(f"each of {len(texts)} texts has one reference or more, got lists of {len(references)}")
