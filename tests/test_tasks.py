"""Generated tasks: the grammar, the values and the labels are those of their definitions, and a seed gives the same
again."""

from collections import Counter

import pytest
import torch

from effzoo.errors import OptionError
from effzoo.tasks import ListOps, duplication, evaluate
from effzoo.tasks.listops import VOCABULARY

SMALL = ListOps(depth=4, arguments=4, shortest=5, longest=40)


def value_of(text: str) -> int:
    """An independent evaluator: the expression rewritten as Python and evaluated."""
    names = {"[MIN": "min((", "[MAX": "max((", "[MED": "med((", "[SM": "sm(("}
    code = "".join(names.get(token) or ("))," if token == "]" else f"{token},") for token in text.split())

    def med(values):
        ordered = sorted(values)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) // 2

    return eval(code.rstrip(","), {"min": min, "max": max, "med": med, "sm": lambda values: sum(values) % 10})


def test_values_equal_those_of_an_independent_evaluator():
    assert (
        evaluate(["[MAX", "2", "9", "[MIN", "4", "7", "]", "0", "]"]) == 9
        and evaluate(["[MED", "1", "4", "]"]) == 2
        and evaluate(["7"]) == 7
    )
    ids, mask, labels = SMALL.examples(300, seed=1)
    for row, keep, label in zip(ids, mask.bool(), labels, strict=True):
        tokens = [VOCABULARY[i] for i in row[keep]][1:]
        assert value_of(" ".join(tokens)) == label


def test_expressions_keep_the_grammar_the_length_and_differ():
    ids, mask, labels = SMALL.examples(500, seed=2)
    assert len({tuple(row.tolist()) for row in ids}) == 500 and set(labels.tolist()) <= set(range(10))
    lengths = mask.sum(dim=1) - 1
    assert lengths.min() >= 5 and lengths.max() <= 40 and (ids[:, 0] == 1).all()
    for row, keep in zip(ids, mask.bool(), strict=True):
        depth, arguments = 0, []
        for token in (VOCABULARY[i] for i in row[keep][1:]):
            if token.startswith("["):
                arguments.append(0)
                depth += 1
                assert depth <= 3  # the leaves are one deeper
            elif token == "]":
                depth -= 1
                assert 2 <= arguments.pop() <= 4
            if not token.startswith("[") and arguments:
                arguments[-1] += 1
        assert depth == 0


def test_operators_and_digits_are_drawn_evenly_and_by_the_seed():
    again = [SMALL.examples(400, seed=3) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True)) and not torch.equal(
        again[0][0], SMALL.examples(400, seed=4)[0]
    )
    count = Counter(VOCABULARY[i] for i in again[0][0].flatten().tolist())
    operators = [count[name] for name in ("[MIN", "[MAX", "[MED", "[SM")]
    assert max(operators) < 1.25 * min(operators)


def test_duplication_labels_are_the_second_word_alone():
    ids, labels = duplication(5, 7, 9, torch.Generator().manual_seed(0))
    assert (
        ids.shape == (5, 16)
        and torch.equal(ids[:, :8], ids[:, 8:])
        and (ids[:, 0] == 0).all()
        and ids[:, 1:8].min() >= 1
        and ids.max() <= 9
    )
    assert (labels[:, :9] == -100).all() and torch.equal(labels[:, 9:], ids[:, 9:])
    assert torch.equal(ids, duplication(5, 7, 9, torch.Generator().manual_seed(0))[0])


def test_sizes_that_make_no_task_say_so():
    with pytest.raises(OptionError, match="word of at least 1"):
        duplication(2, 0, 9, torch.Generator())
    with pytest.raises(OptionError, match="shortest <= longest"):
        ListOps(shortest=9, longest=3)
    with pytest.raises(OptionError, match="not a whole expression"):
        evaluate(["[MAX", "1"])
