"""What methods train on Llama-3.2-3B is what peft counts for the experiments of its comparison of methods."""

import importlib.util
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING


def script():
    found = importlib.util.spec_from_file_location("peft_counts", Path(__file__).parents[1] / "scripts/peft_counts.py")
    sys.modules["peft_counts"] = importlib.util.module_from_spec(found)
    found.loader.exec_module(sys.modules["peft_counts"])
    return sys.modules["peft_counts"]


def of_peft(one, sizes, layers):
    """peft's own count, on a model of shapes."""
    config = transformers.LlamaConfig(
        hidden_size=sizes["dim"], num_hidden_layers=layers, num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"], head_dim=sizes["head_dim"], intermediate_size=sizes["mlp"],
        vocab_size=sizes["vocab"], tie_word_embeddings=sizes["tied"], pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        base = transformers.LlamaForCausalLM(config)
        adapter = PEFT_TYPE_TO_CONFIG_MAPPING[one.kind](task_type="CAUSAL_LM", **one.options)
        return peft.get_peft_model(base, adapter).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    "number", range(len(script().EXPERIMENTS)), ids=lambda number: script().EXPERIMENTS[number].name
)
def test_a_method_trains_as_many_parameters_as_in_peft(number):
    counts = script()
    one = counts.EXPERIMENTS[number]
    assert counts.trainable([one.spec], 2) == [of_peft(one, counts.SIZES, 2)]


@pytest.mark.slow
def test_the_table_has_the_counts_of_peft_on_the_whole_model():
    counts = script()
    ours = dict(zip((one.name for one in counts.EXPERIMENTS), counts.on_the_whole_model(), strict=True))
    assert counts.SIZES["layers"] == 28
    assert ours == {one.name: of_peft(one, counts.SIZES, 28) for one in counts.EXPERIMENTS}


def test_the_counts_are_those_that_peft_has_published():
    """`num_trainable_params` of the results in method_comparison/MetaMathQA."""
    counts = script()
    of = dict(zip((one.name for one in counts.EXPERIMENTS), counts.on_the_whole_model(), strict=True))
    assert of["vblora/default"] == 1_212_416
