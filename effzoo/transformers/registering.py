"""The classes under the names by which transformers finds them."""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from effzoo.folder.description import MODEL_TYPE
from effzoo.transformers import models
from effzoo.transformers.config import EffzooConfig

PLACES = (  # class, the Auto class that makes it, the table of names that pipelines and Trainer read
    (models.EffzooModel, AutoModel, "MODEL_MAPPING_NAMES"),
    (
        models.EffzooForSequenceClassification,
        AutoModelForSequenceClassification,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    (
        models.EffzooForTokenClassification,
        AutoModelForTokenClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    (models.EffzooForQuestionAnswering, AutoModelForQuestionAnswering, "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    (models.EffzooForMaskedLM, AutoModelForMaskedLM, "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    (models.EffzooForCausalLM, AutoModelForCausalLM, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    (models.EffzooForSeq2SeqLM, AutoModelForSeq2SeqLM, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
)


def register() -> None:
    """Tell transformers of the configuration and of each class."""
    AutoConfig.register(MODEL_TYPE, EffzooConfig, exist_ok=True)
    for cls, auto, table in PLACES:
        auto.register(EffzooConfig, cls, exist_ok=True)
        # label smoothing shifts the labels of classes in this table alone
        getattr(modeling_auto, table)[MODEL_TYPE] = cls.__name__
