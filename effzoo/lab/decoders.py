"""Small decoders of the lab: pretrained on texts alone, then taught to write the text of a meaning."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import effzoo
from effzoo.architectures import Transformer
from effzoo.builder import build
from effzoo.lab.fit import Batch
from effzoo.lab.meanings import Meaning, words

PAD, END, UNKNOWN = 0, 1, 2
IGNORED = -100  # a label that does not count
LONGEST = 45  # tokens of a text that is written
DOCUMENT = 96  # tokens of a document, the first ones
Sequenced = tuple[list[int], int]  # token ids, and the first that is learned


class Vocabulary:
    """Words as numbers; 0 is padding, 1 the end of a text, 2 a word that is not known.

    meanings: whose texts give the words, those that occur twice or more, and whose slots give all of theirs.
    """

    def __init__(self, meanings: Sequence[Meaning]):
        counts = Counter(word for m in meanings for text in m.references for word in words(text))
        known = {word for word, count in counts.items() if count > 1} | {w for m in meanings for w in words(m.line)}
        self.words = ["<pad>", "<end>", "<unknown>", *sorted(known)]
        self._places = {word: place for place, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Token ids, the end among them."""
        return [*(self._places.get(word, UNKNOWN) for word in words(text)), END]

    def decode(self, ids: Sequence[int]) -> str:
        """The words before the end, with spaces between them."""
        ids = list(ids)
        return " ".join(self.words[i] for i in (ids[: ids.index(END)] if END in ids else ids))


def documents(vocabulary: Vocabulary, meanings: Sequence[Meaning], seed: int = 0) -> list[Sequenced]:
    """Texts without their meanings: those of one meaning stand together, four in a document, in a drawn order. So a
    decoder that continues one learns to say again what it has read."""
    draw, found = random.Random(seed), []
    for meaning in meanings:
        texts = draw.sample(meaning.references, len(meaning.references))
        for start in range(0, len(texts), 4):
            ids = [i for text in texts[start : start + 4] for i in vocabulary.encode(text)]
            found.append((ids[:DOCUMENT], 0))
    return found


def pairs(vocabulary: Vocabulary, meanings: Sequence[Meaning]) -> list[Sequenced]:
    """Each meaning with each of its texts behind it, of which the text is learned."""
    found = []
    for meaning in meanings:
        line = vocabulary.encode(meaning.line)
        found += [([*line, *vocabulary.encode(text)], len(line)) for text in meaning.references]
    return found


def stream(sequences: Sequence[Sequenced], size: int, seed: int) -> Iterator[Batch]:
    """Batches without end, padded on the right, each epoch in a new order and without what fills no batch."""
    draw, size = torch.Generator().manual_seed(seed), min(size, len(sequences))
    while True:
        order = torch.randperm(len(sequences), generator=draw).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield batch([sequences[i] for i in order[start : start + size]])


def batch(sequences: Sequence[Sequenced]) -> Batch:
    """Ids, mask and labels of some sequences, padded on the right."""
    longest = max(len(ids) for ids, _ in sequences)
    tokens = torch.full((len(sequences), longest), PAD)
    mask, labels = torch.zeros_like(tokens), torch.full_like(tokens, IGNORED)
    for row, (ids, first) in enumerate(sequences):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
        labels[row, first : len(ids)] = torch.tensor(ids[first:])
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def decoder(vocabulary: Vocabulary, *, dim: int, layers: int = 3, seed: int = 0) -> Transformer:
    """A decoder of Llama's shape with heads of 32 dimensions or fewer, feed-forwards of 2 dim and a tied head."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "dim": dim, "layers": layers, "heads": 4, "kv_heads": 4, "mlp": 2 * dim, "vocab": len(vocabulary),
        "max_length": 192, "rotary_theta": 1e4, "rotary_scaling": None, "tied": True, "bos_token": None,
        "eos_token": END, "pad_token": PAD,
    }  # fmt: skip
    return build("llama", task="causal_lm", **sizes)


@torch.no_grad()
def write(model: Transformer, vocabulary: Vocabulary, meanings: Sequence[Meaning]) -> list[str]:
    """The most likely next word again and again, until the end: one text for each meaning."""
    lines = [vocabulary.encode(meaning.line) for meaning in meanings]
    longest = max(map(len, lines))
    prompt = torch.tensor([[PAD] * (longest - len(line)) + line for line in lines])
    mask: Tensor = torch.tensor([[0] * (longest - len(line)) + [1] * len(line) for line in lines])
    written = effzoo.generate(model, prompt, mask, max_new_tokens=LONGEST, eos_token_id=END, pad_token_id=PAD)
    return [vocabulary.decode(row) for row in written[:, longest:].tolist()]
