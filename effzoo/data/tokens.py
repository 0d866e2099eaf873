"""Tables as tokens: `tokenise` for every task, with `tokenizer_of`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from effzoo.annotations import Count, ProperShare, Seed, Whole
from effzoo.architectures import Config, EncoderDecoder, Perceiver, PerceiverConfig, Transformer
from effzoo.checked import IGNORED
from effzoo.data.chat import chat_tokens
from effzoo.data.files import first_line
from effzoo.data.questions import check_room, windows
from effzoo.data.tags import tagged_tokens
from effzoo.data.texts import check_table, names
from effzoo.errors import DataError, did_you_mean, listing, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NEEDED = {  # the columns that a task reads
    "features": ("text",), "classification": ("text", "label"), "token_classification": ("words", "tags"),
    "question_answering": ("question", "context"), "causal_lm": ("text",), "masked_lm": ("text",),
}  # fmt: skip
log = logging.getLogger("effzoo")


def tokenise(
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: Count,
    *,
    task: str = "classification",
    mask_share: ProperShare = 0.15,
    seed: Seed = 0,
    overflow: Literal["cut", "rows"] = "cut",
    stride: Whole | None = None,
    every_piece: bool = False,
    global_question: bool = False,
    offsets: bool = False,
    num_proc: Count | None = None,
    cache: bool = True,
) -> Dataset:
    """Texts as input_ids, attention_mask, perhaps token_type_ids, and labels, for `effzoo.finetune`.

    Nothing is padded: that is done batch by batch. Of two texts the longer one is cut, token by token.

    data: a table as `load_text`, `load_tags`, `load_questions` or `load_chat` gives it.
    tokenizer: of transformers, as `tokenizer_of` gives it.
    max_length: in tokens; longer texts are cut, and how many is logged.
    task: "classification" keeps the label, or makes a list of 0 and 1 of several; "features" has none. "causal_lm"
        copies the tokens to labels, which the model shifts; of `messages` only those of the assistant count.
        "masked_lm" predicts some tokens: 80 % of them are replaced by the mask, 10 % by any token, and 10 % stay.
        "token_classification" gives the label of each word to its first token. "question_answering" gives the first and
        the last token of the answer, and reads a long context in several windows.
    mask_share: of the tokens that "masked_lm" predicts.
    seed: of these tokens.
    overflow: of "causal_lm" and "masked_lm" on texts: "rows" goes on in further rows where "cut" loses what is longer.
    stride: of "question_answering": tokens of the context that two windows share; None for a quarter of max_length, at
        most 128.
    every_piece: of "token_classification": every token of a word has its label, not only the first.
    global_question: of "question_answering": a column global_attention_mask marks the question, for attention that
        knows global tokens (Beltagy et al. 2020, arXiv:2004.05150, section 6).
    offsets: of "token_classification" and "question_answering": keep where each token comes from, which `tags_of` and
        `answers_of` read: a column overflow_to_sample_mapping, the row of `data`, and offset_mapping, for each token
        (word, 0) or its characters in the context, (-1, -1) for none.
    num_proc: processes that share the rows; the result is the same. None: this one alone.
    cache: read what an earlier call has written for the same rows, tokenizer and arguments, beside the table's own file
        (`datasets` keeps it); a table that was made in memory has no file.

    Raises DataError.

    Masking: Devlin et al. 2019, BERT, arXiv:1810.04805, section 3.1.
    """
    import pyarrow.compute

    check_table(data)
    _check_tokenizer(tokenizer, task)
    needed = ("messages",) if task == "causal_lm" and "messages" in data.column_names else NEEDED[task]
    _check_columns(data, task, needed)
    if max_length < 1 or not 0 < mask_share < 1:
        raise DataError(f"max_length is at least 1 and mask_share between 0 and 1, got {max_length} and {mask_share}")
    if overflow not in ("cut", "rows") or (overflow == "rows" and needed != ("text",)):
        raise DataError(
            f"overflow is 'cut', or 'rows' for causal_lm and masked_lm on texts, got {shown(overflow)} for {task} on "
            f"{listing(needed)}"
        )
    if stride is None:
        stride = min(128, max_length // 4)

    labels = names(data) if needed == ("text", "label") else None
    several = labels is not None and not hasattr(data.features["label"], "names")

    def encode(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        if task == "token_classification":
            return tagged_tokens(batch, rows, tokenizer, max_length, every_piece, offsets)
        if task == "question_answering":
            return windows(batch, rows, tokenizer, max_length, stride, global_question, offsets)
        if needed == ("messages",):
            return chat_tokens(batch, rows, tokenizer, max_length)
        pairs = (batch["text_pair"],) if "text_pair" in batch else ()
        more = {"return_overflowing_tokens": True} if overflow == "rows" else {}
        tokens = dict(tokenizer(batch["text"], *pairs, truncation=True, max_length=max_length, padding=False, **more))
        of_row = tokens.pop("overflow_to_sample_mapping", range(len(rows)))
        if task == "features":
            return tokens
        if several:
            held = [[float(number in row) for number in range(len(labels or ()))] for row in batch["label"]]
            return {**tokens, "labels": held}
        if task == "classification":
            return {**tokens, "labels": batch["label"]}
        if task == "causal_lm":
            return {**tokens, "labels": [list(ids) for ids in tokens["input_ids"]]}
        streams = _streams(seed, [rows[row] for row in of_row])
        texts = zip(tokens["input_ids"], streams, strict=True)
        masked = [_mask(ids, tokenizer, mask_share, random) for ids, random in texts]
        return {**tokens, "input_ids": [ids for ids, _ in masked], "labels": [labels for _, labels in masked]}

    if task == "question_answering":
        check_room(tokenizer, max_length, stride)
    tokenizer("", truncation=True, max_length=max_length)  # whose state is then the same at each call, as is its hash
    table = data.map(
        encode, batched=True, with_indices=True, remove_columns=data.column_names, load_from_cache_file=cache,
        num_proc=num_proc, desc="Tokenising",
    )  # fmt: skip
    if task == "classification" and not several:
        table = table.cast_column("labels", data.features["label"])
    if len(table) > len(data):
        log.info("%d texts make %d rows of at most %d tokens", len(data), len(table), max_length)
    full = 0
    for part in table.with_format("arrow").iter(batch_size=10_000):
        full += pyarrow.compute.list_value_length(part["input_ids"]).to_pylist().count(max_length)
    if full and overflow == "cut" and task != "question_answering":
        log.info("%d of %d texts fill all %d tokens; what is longer was cut", full, len(table), max_length)
    return table


def _check_tokenizer(tokenizer: Any, task: str) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "mask_token_id"):
        raise DataError(
            f"a tokenizer is one of transformers, as tokenizer_of gives, got {shown(tokenizer)} "
            f"({type(tokenizer).__name__})"
        )
    if task not in NEEDED:
        raise DataError(f"task is one of {listing(NEEDED)}, got {task!r}{did_you_mean(task, NEEDED)}")
    if task == "masked_lm" and tokenizer.mask_token_id is None:
        raise DataError("this tokenizer has no mask token, which task='masked_lm' needs; try task='causal_lm'")
    if task in ("token_classification", "question_answering") and not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"task {task!r} needs to know where tokens come from, which {type(tokenizer).__name__} does not say; take "
            "a fast tokenizer (a folder with tokenizer.json)"
        )


def _check_columns(data: Dataset, task: str, needed: tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in data.column_names]
    if missing == ["tags"]:
        return  # words to find tags for
    if missing:
        how = {"words": "; load_tags reads them", "question": "; load_questions reads them"}.get(needed[0], "")
        raise DataError(
            f"task {task!r} needs the columns {' and '.join(needed)}; there are {listing(data.column_names)}{how}"
        )


def _streams(seed: int, rows: list[int]) -> list[np.random.RandomState]:
    """Random numbers for each text; those of one row follow each other."""
    made: dict[int, np.random.RandomState] = {}
    return [made.setdefault(row, np.random.RandomState((seed * 1_000_003 + row) % 2**32)) for row in rows]


def tokenizer_of(source: str | Path | Config | Transformer) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, of a hub id, or of a zoo model's pretrained weights. Raises DataError."""
    from transformers import AutoTokenizer

    from effzoo import convert
    from effzoo.convert.source import quiet

    config = source.config if isinstance(source, Transformer | EncoderDecoder) else source
    if isinstance(config, (Perceiver, PerceiverConfig)):
        raise DataError(
            "a Perceiver reads bytes or arrays and has no tokenizer in the zoo; give the folder or hub id of the one "
            "its text was trained with"
        )
    place = convert.source_of(config) if isinstance(config, Config) else str(config)
    try:
        with quiet():  # transformers warns of a config.json of another library beside a tokenizer
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # of many kinds: no such folder, no network, no such repository, a broken file
        raise DataError(
            f"no tokenizer at {place!r}: {first_line(error)}; give a folder with tokenizer.json, or a hub id"
        ) from error
    if isinstance(config, Config) and len(tokenizer) > config.vocab:
        raise DataError(
            f"the tokenizer at {place!r} has {len(tokenizer)} tokens, the model {config.name} a "
            f"vocabulary of {config.vocab}"
        )
    return tokenizer


def _mask(
    ids: list[int], tokenizer: PreTrainedTokenizerBase, share: float, random: np.random.RandomState
) -> tuple[list[int], list[int]]:
    """Masked ids, and labels: -100 except for the tokens to predict, at least one where not all are special."""
    special = set(tokenizer.all_special_ids)
    ordinary = [at for at, token in enumerate(ids) if token not in special]
    masked, labels = list(ids), [IGNORED] * len(ids)
    if ordinary:
        for at in random.choice(ordinary, size=max(1, round(share * len(ordinary))), replace=False):
            labels[at], lot = ids[at], random.rand()
            if lot < 0.9:
                masked[at] = tokenizer.mask_token_id if lot < 0.8 else int(random.randint(len(tokenizer)))
    return masked, labels
