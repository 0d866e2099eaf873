"""Prompts and P-tuning in the files of peft: one tensor `prompt_embeddings` [length, dim].

The encoder of P-tuning is dropped there too. The prompt takes the first positions in both libraries. Heads that read
the first position see the first token in effzoo and the first prompt token in peft, so such models are refused; and so
is attention with windows, where our prompt is global.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor

from effzoo.convert.peft_files.twin import TASK_TYPES, Config, Modules, Twin, Wanted, Written, first_axis, shaped
from effzoo.errors import AdapterError
from effzoo.peft import Method
from effzoo.peft.input.p_tuning import PTuning
from effzoo.peft.input.prompt import PromptTokens, ReparametrisedPrompt

log = logging.getLogger("effzoo.convert")
CLASSES = (PromptTokens, ReparametrisedPrompt)
KEY = "prompt_embeddings"


def check_attention(twin: Twin) -> None:
    """AdapterError for attention that sees prompts otherwise than peft, and tasks in which peft leaves them out."""
    kinds = sorted({core.name for core in twin.model.cores()} - {"full"})
    if kinds:
        raise AdapterError(
            f"prompts and prefixes on attention {kinds[0]!r}: in effzoo every query sees them, in peft their tokens "
            "fall out of a window like any other; use lora or ia3"
        )
    if twin.task_type is None:
        raise AdapterError(
            f"peft leaves prompts and prefixes out when a model is run for {twin.model.task}; it "
            f"knows {', '.join(TASK_TYPES)}"
        )


def check_reading(twin: Twin) -> None:
    """AdapterError where the two libraries compute different things with the same prompt."""
    task, config = twin.model.task, twin.model.config
    check_attention(twin)
    if (task == "classification" and config.pooling != "last") or (
        task == "features" and config.pooler and not config.causal
    ):
        raise AdapterError(
            f"prompts on {config.name} for {task}: the head reads the first token (or the mean of the tokens) in "
            "effzoo, and in peft the prompt counts as tokens; no file can say the same to both. Use another "
            "task, a decoder, or another method"
        )
    if task == "classification":
        log.warning(
            "%s for classification: behind a prompt, transformers reads the last position, padding or not; pad on "
            "the left there",
            config.name,
        )


def write(twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
    check_reading(twin)
    if len(modules) != 1:
        raise AdapterError(f"peft has one prompt, this adapter has {len(modules)}")
    (module,) = modules.values()
    assert isinstance(module, PromptTokens | ReparametrisedPrompt)
    prompt = module.prompt()
    config: Config = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    if isinstance(methods[0], PTuning):
        config = {
            "peft_type": "P_TUNING",
            "encoder_hidden_size": methods[0].hidden,
            "encoder_reparameterization_type": "MLP",
        }
    return Written(config | sizes(twin, len(prompt), twin.model.config.dim, twin.model.config.heads), {KEY: prompt})


def sizes(twin: Twin, length: int, width: int, heads: int) -> Config:
    """What peft wants to know of the model."""
    return {
        "num_virtual_tokens": length, "token_dim": width, "num_attention_heads": heads,
        "num_layers": twin.model.config.layers, "num_transformer_submodules": 1,
    }  # fmt: skip


def check_sizes(config: Config, expected: Config) -> None:
    """AdapterError for a size in the file's config that is not this model's: the numbers would be read as others."""
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            raise AdapterError(
                f"{name} is {config[name]} in the config of the file and {value} in this model; it "
                "was trained on another base"
            )


def read(
    twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
) -> dict[str, Wanted]:
    """`prompt`, or `p_tuning` that is finished already."""
    check_reading(twin)
    prompt, width = only(tensors, KEY), twin.model.config.dim
    check_sizes(config, sizes(twin, first_axis(KEY, prompt), width, twin.model.config.heads))
    shaped(KEY, prompt, len(prompt), width)
    (path,) = (path for path, site in twin.sites.items() if site.role == "embed.token")
    method = "p_tuning" if config["peft_type"] == "P_TUNING" else "prompt"
    return {path: Wanted(method, {"length": len(prompt)}, {"tokens": prompt})}


def only(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor of this name, if it is the only one."""
    for name in (key, *tensors):
        if name not in tensors or name != key:
            raise AdapterError(
                f"{name} is {'missing' if name == key else 'one too many'} in the file, which has "
                f"{key} alone for this method"
            )
    return tensors[key]
