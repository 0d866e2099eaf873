"""What the checks have to know of single methods and kinds: where mathematics says that nothing is learned, and what is
shared.

A method of one's own adds an entry: effzoo.checks.facts.ZERO_GRADIENT["mine"] = {"*.bias": "the softmax takes it out"}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effzoo.peft.method import Method
from effzoo.peft.modular.mixture import MixtureMethod
from effzoo.sites import MemorySite

SOFTMAX = "softmax does not change when one number is added to all scores of a query, so key biases have none"
_COPIES = {"*.k*.own_bias": SOFTMAX}
ZERO_GRADIENT: dict[str, Mapping[str, str]] = {  # method -> pattern of role.tensor -> why its gradient vanishes
    **dict.fromkeys(("full", "last", "freeze", "head", "bitfit"), _COPIES),
    "lt_sft": {"*.k*.full_bias": SOFTMAX},
    "diff": {"*.k*.w_bias": SOFTMAX},
    "pals": {"*.qkv.bias": SOFTMAX},
    "ladder": {"*.attn.k*.bias": SOFTMAX},
}
# method -> why two modules of it may do the same at a site, so that a router over them learns nothing there
SAME_AT_START: dict[str, str] = {
    "head_pruning": "the gates of a layer start at the same value",
    "fish": "the entries that are trained may all lie at other sites",
}

# method -> why, in a causal model that labels a text, what it computes at a token depends on the tokens after it
READS_ALL: dict[str, str] = {"unipelt": "its gates are means over all tokens of the text"}

# attention kind -> the options that checks use, where those of `declared.small` would make it full attention
SMALL_OPTIONS: dict[str, dict[str, Any]] = {
    "bigbird": {"block": 3, "random": 1},
    "dilated": {"segments": (4, 16), "dilations": (1, 2)},
}

# method -> which of its trained tensors several sites share, where the paper wants that
SHARED: dict[str, str] = {
    "compacter": "the matrices of the Kronecker sums", "compacter_plus": "the matrices of the Kronecker sums",
    "fish": "one vector holds the entries of all tensors", "intrinsic": "one vector is projected to all tensors",
    "said": "one vector is projected to all tensors", "mam": "the reparametrisation of the prefixes",
    "vblora": "one bank of vectors is for all",
    "unipelt": "the reparametrisation of the prefixes", "pals": "the projections to the small width and back",
}  # fmt: skip


def zero_gradient(method: Method) -> dict[str, str]:
    """The patterns of role.tensor whose gradient vanishes by mathematics, each with the reason; a mixture's are its
    experts'."""
    if not isinstance(method, MixtureMethod):
        return dict(ZERO_GRADIENT.get(method.name, {}))
    experts = [inner for expert in method.inner for inner in expert]
    reasons = {pattern: why for inner in experts for pattern, why in zero_gradient(inner).items()}
    equal = sorted({f"{inner.name}: {SAME_AT_START[inner.name]}" for inner in experts if inner.name in SAME_AT_START})
    return reasons | ({"*.router.*": "; ".join(equal)} if equal else {})


def reads_all(method: Method) -> bool:
    """Whether a method reads the whole text at every token: as it says, or as a mixture that routes memories, by the
    mean of the text."""
    if not isinstance(method, MixtureMethod):
        return method.name in READS_ALL
    return any(reads_all(inner) or MemorySite in inner.accepts for expert in method.inner for inner in expert)
