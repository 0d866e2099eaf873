"""Models of effzoo as models of transformers: `AutoModel`, `pipeline` and `Trainer` take them.

    import effzoo.transformers                                    # registers the classes below
    AutoModelForSequenceClassification.from_pretrained(folder)    # a folder that effzoo.save wrote
    effzoo.transformers.wrap(model)                               # a model that is there

Each class holds a model of effzoo, `model.inner`, and computes what that computes. Names of parameters are those of the
inner model, and the functions of effzoo (`attach`, `save`, `merge`, ...) take either.
"""

from effzoo.transformers.config import EffzooConfig
from effzoo.transformers.models import (
    EffzooForCausalLM,
    EffzooForMaskedLM,
    EffzooForQuestionAnswering,
    EffzooForSeq2SeqLM,
    EffzooForSequenceClassification,
    EffzooForTokenClassification,
    EffzooModel,
    EffzooPreTrainedModel,
    without_adapters,
    wrap,
)
from effzoo.transformers.registering import register

__all__ = [
    "EffzooConfig",
    "EffzooForCausalLM",
    "EffzooForMaskedLM",
    "EffzooForQuestionAnswering",
    "EffzooForSeq2SeqLM",
    "EffzooForSequenceClassification",
    "EffzooForTokenClassification",
    "EffzooModel",
    "EffzooPreTrainedModel",
    "without_adapters",
    "wrap",
]

register()
