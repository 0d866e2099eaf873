"""The factors A and B of LoRA, of a model that has them attached or of a file, by the matrix that they change."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from effzoo.errors import DataError, InputError
from effzoo.peft.parameter.lora import LowRank
from effzoo.sites import sites

Factors = dict[str, tuple[Tensor, Tensor]]  # A [r, in] and B [out, r] by the path of the matrix, whose change is B A


def attached_factors(model: nn.Module) -> Factors:
    """A and s B of every matrix with active LoRA, by the path of its site: their product is the whole change.

    Raises InputError for none.
    """
    modules = {path: module for path, site in sites(model) for module in site.hung() if isinstance(module, LowRank)}
    if not modules:
        raise InputError("no LoRA acts on a matrix of this model; attach one, effzoo.attach(model, 'lora')")
    return {path: (module.A.detach().clone(), module.scale * module.B.detach()) for path, module in modules.items()}


def read_factors(path: Path) -> Factors:
    """The pairs of an .npz file whose keys end in lora_A [r, in] and lora_B [out, r], by what stands before.

    Raises DataError for none.
    """
    if path.suffix != ".npz":
        raise DataError(
            f"{path} is no .npz file; give one whose keys end in lora_A [r, in] and lora_B [out, r], or "
            "leave --data out to train"
        )
    with np.load(path, allow_pickle=False) as file:
        factors = {key: torch.from_numpy(file[key]) for key in file.files if re.search(r"\.lora_[AB]$", key)}
    names = [key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")]
    lonely = [name for name in names if f"{name}.lora_B" not in factors]
    if not names or lonely:
        raise DataError(
            f"{path} has no pair NAME.lora_A and NAME.lora_B{f' for {lonely[0]}' if lonely else ''}; it "
            f"has {len(factors)} such keys"
        )
    pairs = {name: (factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]) for name in names}
    for name, (A, B) in pairs.items():
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise DataError(
                f"{name} in {path}: lora_A [r, in] and lora_B [out, r] do not fit, got {list(A.shape)} "
                f"and {list(B.shape)}"
            )
    return pairs
