"""What a folder carries so that transformers finds the classes that open it, where effzoo is installed."""

from __future__ import annotations

from effzoo.folder.description import CLASSES

FILE = "modeling_effzoo.py"
AUTO = {
    "features": "AutoModel", "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification", "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM", "causal_lm": "AutoModelForCausalLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
}  # fmt: skip
AUTO_MAP = {"AutoConfig": "modeling_effzoo.EffzooConfig"} | {
    AUTO[task]: f"modeling_effzoo.{name}" for task, name in CLASSES.items()
}
_NAMES = "".join(f"    {name},\n" for name in ("EffzooConfig", *sorted(CLASSES.values())))
CODE = f'''"""Opens this folder in transformers: AutoModel.from_pretrained(folder, trust_remote_code=True).

The code is that of the package effzoo, which has to be installed; after `import effzoo.transformers` it is not needed.
"""

from effzoo.transformers import (
{_NAMES})
'''
