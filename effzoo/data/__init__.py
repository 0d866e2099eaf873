"""Data: read it (`load_text`, `load_tags`, `load_questions`, `load_chat`), divide it (`split`), turn it into tokens
(`tokenise`, with `tokenizer_of`), join it to rows (`pack`), and score what a model says of it.

The tables are `datasets.Dataset`, which is imported when a function runs: `import effzoo` does not import it.
"""

from effzoo.annotations import check_arguments
from effzoo.data.chat import load_chat
from effzoo.data.questions import Answer, answer_metrics, answer_scores, answers_of, load_questions
from effzoo.data.scores import label_metrics, number_metrics
from effzoo.data.splitting import split
from effzoo.data.tags import entities, entity_metrics, entity_scores, load_tags, tags_of
from effzoo.data.texts import load_text, names, parts
from effzoo.data.tokens import tokenise, tokenizer_of
from effzoo.packing import pack

__all__ = [
    "Answer",
    "answer_metrics",
    "answer_scores",
    "answers_of",
    "entities",
    "entity_metrics",
    "entity_scores",
    "label_metrics",
    "load_chat",
    "load_questions",
    "load_tags",
    "load_text",
    "names",
    "number_metrics",
    "pack",
    "parts",
    "split",
    "tags_of",
    "tokenise",
    "tokenizer_of",
]

check_arguments(globals())
