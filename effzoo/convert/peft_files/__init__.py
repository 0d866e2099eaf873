"""Adapters in the files of the `peft` package, both ways: adapter_config.json and adapter_model.safetensors.

`effzoo.save_adapter(model, folder, name=..., format="peft")` writes what `peft.PeftModel.from_pretrained(twin, folder)`
loads, on the model of transformers with the same weights (`effzoo.convert.to_transformers` of the model without
adapters); `effzoo.load_adapter(model, folder)` reads what peft has saved. Both sides then compute the same.

    ours                                     theirs
    lora (rslora, ranks by role), dora       LORA; pissa and olora as a LoRA of twice the rank
    lora with an invocation                  LORA with alora_invocation_tokens
    ia3                                      IA3
    krona                                    LOKR with full factors
    adalora                                  ADALORA, its pruned triplets as rank_pattern
    loha, vera, vblora                       LOHA, VERA, VBLORA with all logits
    fourierft, hra, miss                     FOURIERFT, HRA, MISS
    oft, boft                                OFT with whole blocks and the inverse itself, BOFT
    prompt                                   PROMPT_TUNING
    p_tuning, prefix (without networks)      P_TUNING, PREFIX_TUNING
    llama_adapter, gates equal in all heads  ADAPTION_PROMPT
    tokens alone, lora|tokens                TRAINABLE_TOKENS, trainable_token_indices of LORA
    norms alone                              LN_TUNING
    the task head, other whole modules       modules_to_save
    lora|bitfit                              bias="lora_only" or "all" of LORA

A language-model head that is tied to the token table: a LoRA of ours on the table changes both, which is
`ensure_weight_tying` there; without it peft changes lookups alone (`lora[tied=false]`), or the head alone (a LoRA on
`lm.out`).

Unlike peft, which loads what fits and warns, reading is strict: a tensor that is missing, too many or of another shape,
and an option that effzoo has no counterpart for, is an AdapterError, and the model is then as it was. Regular
expressions are matched in bounded time.

What such files cannot do is prove the base: they hold no hash of its weights, and `base_model_name_or_path` is a name
that is only logged. Where representing the same function would need something that peft lacks, a sentence says so;
nothing is approximated.

Two differences are in peft's models and not in the files, and the logger "effzoo.convert" warns of them: behind a
prefix learned positions go on (`memory`), and behind a prompt classifying decoders read the last position even if it is
padding.

What was trained with dropout of other forms than ours continues without it, and optimizer states are not part of either
format.
"""

from effzoo.convert.peft_files.reading import read
from effzoo.convert.peft_files.writing import write

__all__ = ["read", "write"]
