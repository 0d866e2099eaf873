"""Input composition, f([phi, x]): methods that add prompt tokens to the input, or keys and values to attention."""

from effzoo.peft.input import deep_prompt, ipt, llama_adapter, p_tuning, prefix, prompt
from effzoo.peft.input.ipt import fit_subspace

__all__ = ["deep_prompt", "fit_subspace", "ipt", "llama_adapter", "p_tuning", "prefix", "prompt"]
