"""Conversations: `load_chat`, and their tokens by the tokenizer's template, of which only the assistant's count."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effzoo.checked import IGNORED
from effzoo.data.files import Reading, first_line
from effzoo.data.sources import chosen, opened
from effzoo.data.texts import pick
from effzoo.errors import DataError, listing, shown

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MESSAGES = ("messages", "conversations", "conversation", "dialog")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # of ShareGPT and its like
ASSISTANT = "assistant"
UNREAD = ("tool_calls", "function_call", "weight")  # of a message; a weight of 1 is what every message has
_GENERATION = re.compile(r"\{%-?\s*generation\b")


def load_chat(
    source: str | Path,
    *,
    part: str | None = None,
    messages: str | None = None,
    subset: str | None = None,
    encoding: str | Sequence[str] = "utf-8",
) -> Dataset:
    """A table of conversations: `messages`, a list of {"role": "user", "content": "..."}.

    source: a .jsonl, .json or .parquet file, a folder of such files, or a data set on the hub. Messages with "from" and
        "value" are read as well; human and gpt are user and assistant.
    part, subset, encoding: as in `load_text`.
    messages: the name of the column; None takes a usual name that is there.

    Raises DataError with the row that does not fit.
    """
    from datasets import Dataset

    encodings = (encoding,) if isinstance(encoding, str) else tuple(encoding)
    table = chosen(opened(source, subset, Reading(encodings)), part, source)
    column = pick(table, messages, MESSAGES, "messages")
    return Dataset.from_dict({"messages": [_messages(value, row) for row, value in enumerate(table[column])]})


def _messages(value: Any, row: int) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"row {row} holds {shown(value, 60)}, not a list of messages")
    found = []
    for number, message in enumerate(value):
        known = message if isinstance(message, dict) else {}
        role, content = known.get("role", known.get("from")), known.get("content", known.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f'row {row}, message {number}: {shown(message, 80)} is no {{"role": "user", "content": "..."}}, whose '
                "content is a text"
            )
        if lost := [name for name in UNREAD if known.get(name) not in (None, [], {}, 1)]:
            raise DataError(
                f"row {row}, message {number} has {lost[0]}={shown(known[lost[0]], 40)}, which is not read here; write "
                "it into the content, or leave the message out"
            )
        found.append({"role": ROLES.get(role, role), "content": content})
    return found


def chat_tokens(
    batch: Mapping[str, list[Any]], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    """Tokens and labels of conversations; only what the assistant says has labels."""
    template = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else None
    if template is None:
        raise DataError(
            "this tokenizer has no chat template, which says how messages become one text; set "
            "tokenizer.chat_template, or give texts in a column 'text'"
        )
    tokens: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for row, messages in zip(rows, batch["messages"], strict=True):
        if not any(message["role"] == ASSISTANT for message in messages):
            roles = listing(dict.fromkeys(message["role"] for message in messages))
            raise DataError(
                f"row {row} has no message of the role {ASSISTANT!r}, so there is nothing to learn; its roles are "
                f"{roles}"
            )
        try:
            marked = _by_marks(messages, tokenizer) if _GENERATION.search(template) else _by_prefix(messages, tokenizer)
        except DataError as error:
            raise DataError(f"row {row}: {error}") from None
        except Exception as error:  # of a template: jinja2's, or what it raises itself
            raise DataError(f"row {row}: the chat template refuses these messages: {first_line(error)}") from error
        ids, spoken = marked
        labels = [token if said else IGNORED for token, said in zip(ids, spoken, strict=True)]
        tokens["input_ids"].append(ids[:max_length])
        tokens["attention_mask"].append([1] * len(ids[:max_length]))
        tokens["labels"].append(labels[:max_length])
    return tokens


def _by_marks(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them stand between the {% generation %} marks of the template."""
    found: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def _by_prefix(messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them a message of the assistant adds to the text of those before it.

    That text ends in what asks for an answer (add_generation_prompt), where the template has it.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "the assistant's tokens are found by a fast tokenizer, or by {% generation %} marks of a template"
        )

    def text(count: int, ask: bool = False) -> str:
        written: Any = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
        return str(written)

    whole, spans = text(len(messages)), []
    for number, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        before = text(number, ask=True) if number else ""
        after = text(number + 1)
        if not after.startswith(before) and number:
            before = text(number)
        if not whole.startswith(after) or not after.startswith(before):
            raise DataError(
                "the chat template writes a message otherwise when others follow, so the assistant's tokens cannot be "
                "told; put {% generation %} ... {% endgeneration %} around them in the template"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    spoken = [
        last > first and any(start <= first and last <= end for start, end in spans)
        for first, last in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), spoken
