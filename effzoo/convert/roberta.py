"""RoBERTa as transformers lays it out (Liu et al. 2019, arXiv:1907.11692): BERT with positions counted from pad_token +
1. XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116) and CamemBERT (Martin et al. 2020, arXiv:1911.03894) are RoBERTa
with other vocabularies.

Its classification head has a dense layer of its own, so the pooler is not part of it. While training, transformers also
drops out the input of that dense layer, which ours does not. Its language-model head uses gelu whatever the config
says.
"""

from __future__ import annotations

import dataclasses

from effzoo.convert.bert import BERT
from effzoo.convert.keymap import same

HEADS = {
    "features": same({"head.pooler": "{base}pooler.dense"}),
    "classification": same({"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}),
    "token_classification": same({"head.out": "classifier"}),
    "question_answering": same({"head.out": "qa_outputs"}),
    "masked_lm": same({"head.dense": "lm_head.dense", "head.norm": "lm_head.layer_norm", "head.out": "lm_head"}),
}

ROBERTA = dataclasses.replace(
    BERT,
    name="roberta",
    prefix="roberta",
    classes={task: name.replace("Bert", "Roberta") for task, name in BERT.classes.items()},
    heads=HEADS,
    tied={"lm_head.decoder.weight": "{base}embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
    counts_from_pad=True,
    lm_activation="gelu",
)
XLM_ROBERTA, CAMEMBERT = (
    dataclasses.replace(
        ROBERTA, name=name, classes={task: known.replace("Bert", ours) for task, known in BERT.classes.items()}
    )
    for name, ours in (("xlm-roberta", "XLMRoberta"), ("camembert", "Camembert"))
)
