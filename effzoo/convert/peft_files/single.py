"""LoHa, VeRA, FourierFT, OFT, BOFT, HRA, MiSS, VB-LoRA and AdaLoRA in the files of peft: one linear layer of theirs is
one of ours.

What both compute is the same function of the same tensors, under other names; `Form` says which, and what of a config
is which option. What is drawn is drawn alike: VeRA's matrices and the places of FourierFT follow from a seed in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, shaped, tidy
from effzoo.errors import AdapterError
from effzoo.peft import Method, PeftModule
from effzoo.peft.parameter.adalora import AdaLoRA, Triplets
from effzoo.peft.parameter.fourierft import FourierFT, Spectrum
from effzoo.peft.parameter.loha import HadamardProduct
from effzoo.peft.parameter.miss import SharedShards
from effzoo.peft.parameter.rotations import Butterfly, Reflections, Rotation, skew
from effzoo.peft.parameter.vblora import Admixture
from effzoo.peft.parameter.vera import Vectors, VeRA
from effzoo.sites import Linear

ADALORA_EPS = 1e-5  # peft divides its alpha by the rank plus this


@dataclass(frozen=True)
class Form:
    """One method in both libraries.

    method, peft_type: its names.
    module: ours.
    keys: {our tensor: the end of their key}.
    transposed: whether their tensors are ours transposed.
    config: (method, module, their module) -> what their config says of a module; maps are joined.
    options: (config, their module, inputs) -> our options.
    shapes: (our options, outputs, inputs) -> the shape of each of their tensors, by the names of ours.
    written: (module) -> their tensors, by the names of ours, where they are not ours under another name.
    taken: (config, their module, our options, their tensors, shape of the weight) -> our tensors, likewise.
    shared: {our tensor: their key} of what all sites share; its shape is in `shapes`.
    """

    method: str
    peft_type: str
    module: type[PeftModule]
    keys: Mapping[str, str]
    config: Callable[[Method, Any, str], Config]
    options: Callable[[Config, str, int], dict[str, Any]]
    shapes: Callable[[dict[str, Any], int, int], dict[str, tuple[int, ...]]]
    transposed: bool = False
    written: Callable[[Any], Mapping[str, Tensor]] | None = None
    taken: Callable[[Config, str, dict[str, Any], dict[str, Tensor], tuple[int, int]], dict[str, Tensor]] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)

    @property
    def marks(self) -> tuple[str, ...]:
        """What the last part of a key begins with."""
        return tuple(key.partition(".")[0] for key in (*self.keys.values(), *self.shared.values()))

    @property
    def classes(self) -> tuple[type[PeftModule], ...]:
        return (self.module,)

    def write(self, twin: Twin, modules: Modules, methods: Sequence[Method]) -> Written:
        if len(methods) > 1:
            raise AdapterError(
                f"this adapter has {self.method} several times, with options of their own; a config of peft has one "
                "set of them: attach it once"
            )
        out = Written()
        said: dict[str, Config] = {}
        for path, module in modules.items():
            rule = twin.rule(path)
            if len(rule.ours) > 1 or rule.transposed:
                raise AdapterError(
                    f"{self.method} on {path}: it is written for linear layers of transformers, and {rule.theirs} is a "
                    "Conv1D or stacks several of ours; use lora, or merge the adapter"
                )
            out.targets.append(rule.theirs)
            held = {name: getattr(module, name) for name in self.keys} if self.written is None else self.written(module)
            for ours, theirs in self.keys.items():
                out.tensors[f"{rule.theirs}.{theirs}"] = held[ours].T if self.transposed else held[ours]
            out.tensors |= {theirs: getattr(module, ours) for ours, theirs in self.shared.items()}
            if isinstance(module, Rotation) and module.left:
                raise AdapterError(
                    f"oft on {path}: blocks of {module.size} do not divide its {module.inputs} inputs, and peft has no "
                    "smaller block at the end; give a block that divides them"
                )
            said[rule.theirs] = self.config(methods[0], module, rule.theirs)
        out.config = {"peft_type": self.peft_type, "target_modules": out.targets, **next(iter(said.values()))}
        for theirs, own in said.items():
            maps = {key: {**out.config[key], **value} for key, value in own.items() if isinstance(value, dict)}
            out.config |= maps
            if any(value != out.config[key] for key, value in own.items() if key not in maps):
                raise AdapterError(
                    f"{self.method}: the config of peft has one {own} for all sites, and {theirs} has another; give "
                    "its sites the same options"
                )
        return out

    def read(
        self, twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
    ) -> dict[str, Wanted]:
        found: dict[str, dict[str, Tensor]] = {}
        for key in self.shared.values():
            if key not in tensors:
                raise AdapterError(f"{key} is missing in the file; copy the whole adapter")
        common = {ours: tensors[theirs] for ours, theirs in self.shared.items()}
        for key, tensor in tensors.items():
            if key in self.shared.values():
                continue
            ours = next((name for name, theirs in self.keys.items() if key.endswith(f".{theirs}")), None)
            theirs = "" if ours is None else key.removesuffix(f".{self.keys[ours]}")
            rule = twin.rules.get(theirs)
            if (
                ours is None
                or rule is None
                or len(rule.ours) > 1
                or rule.transposed
                or not isinstance(twin.sites[rule.ours[0]], Linear)
            ):
                raise AdapterError(
                    f"{key}: {self.peft_type} is read for single linear layers of this model's twin, which "
                    f"{theirs or key!r} is not"
                )
            found.setdefault(theirs, {})[ours] = tensor.T if self.transposed and tensor.ndim == 2 else tensor
        wanted = {}
        for theirs, own in found.items():
            if lacking := [name for name in self.keys if name not in own]:
                raise AdapterError(f"{theirs}.{self.keys[lacking[0]]} is missing in the file; copy the whole adapter")
            path = twin.rules[theirs].ours[0]
            outputs, inputs = twin.weight(path).shape
            own |= common
            options = self.options(config, theirs, inputs)
            for name, shape in self.shapes(options, outputs, inputs).items():
                shaped(self.shared.get(name) or f"{theirs}.{self.keys[name]}", own[name], *shape)
            if self.taken is not None:
                own = self.taken(config, theirs, options, own, (outputs, inputs))
            wanted[path] = Wanted(self.method, options, own)
        _check_one_size(self, twin, wanted)
        return wanted


def _check_one_size(form: Form, twin: Twin, wanted: Mapping[str, Wanted]) -> None:
    """AdapterError where what all sites share would fall apart, as the roles have other layers each, and are attached
    one by one: the bank of VB-LoRA, and the matrices of VeRA, which are drawn in the largest size of each part."""
    if form.method not in ("vera", "vblora"):
        return
    layers: dict[str, set[int | None]] = {}
    for path in wanted:
        layers.setdefault(twin.sites[path].role, set()).add(twin.sites[path].layer)
    apart = len({frozenset(those) for those in layers.values()}) > 1
    if form.method == "vblora" and apart:
        raise AdapterError(
            "the file has VB-LoRA in other layers for each kind of module; effzoo attaches it once for each choice of "
            "layers, with a bank for each: train it on the same layers for all"
        )
    if apart and len({tuple(twin.weight(path).shape) for path in wanted}) > 1:
        raise AdapterError(
            "the file has VeRA on matrices of several sizes, in other layers for each; effzoo attaches it once for "
            "each choice of layers, and would draw matrices of other sizes: train it on the same layers for all"
        )


def _loha(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    rank = config["rank_pattern"].of(theirs, config.get("r", 8))
    return {"rank": int(rank), "alpha": float(config["alpha_pattern"].of(theirs, config.get("alpha", 8)))}


def _miss(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    if config.get("init_weights", True) not in (True, False):
        raise AdapterError(
            f"init_weights={config['init_weights']!r} of MiSS is another function than [D D D ...] x; effzoo reads the "
            "one of init_weights=true"
        )
    return {"rank": config.get("r", 64)}


def _oft(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    if config.get("use_cayley_neumann", True):
        raise AdapterError(
            "use_cayley_neumann=true of OFT cuts the series of (I - Q)^-1 after a few terms, so its matrices are not "
            "quite rotations; effzoo computes the inverse: train with use_cayley_neumann=false"
        )
    for name in ("coft", "block_share"):
        if config.get(name):
            raise AdapterError(f"{name}=true of OFT has no counterpart in effzoo; train without it")
    blocks, size = config.get("r", 0), config.get("oft_block_size", 32)
    size = inputs // blocks if not size and blocks > 0 else size
    if size < 2 or inputs % size or blocks not in (0, inputs // size):
        raise AdapterError(
            f"r={blocks} blocks of oft_block_size={size} do not fill the {inputs} inputs of {theirs}; one of both is 0 "
            "in the files of peft, and the other divides the inputs"
        )
    return {"block": size}


def _hra(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    if config.get("apply_GS"):
        raise AdapterError(
            "apply_GS=true of HRA makes the reflections orthogonal to each other, which effzoo has not; train "
            "without it"
        )
    if config.get("r", 8) % 2:
        raise AdapterError(f"r={config['r']}: reflections of effzoo come in pairs; train with an even r")
    return {"rank": config.get("r", 8)}


def _fourier(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    if config.get("n_frequency_pattern"):
        raise AdapterError(
            f"n_frequency_pattern={config['n_frequency_pattern']!r}: effzoo reads one number of frequencies for all "
            "modules; train without it"
        )
    return {
        "frequencies": config.get("n_frequency", 1000), "scale": float(config.get("scaling", 150.0)),
        "seed": config.get("random_loc_seed", 777),
    }  # fmt: skip


def _vera_of(method: Method, module: Vectors, theirs: str) -> Config:
    assert isinstance(method, VeRA)
    return {
        "r": method.rank, "projection_prng_key": method.seed, "save_projection": False, "d_initial": method.start,
    }  # fmt: skip


def _fourier_of(method: Method, module: Spectrum, theirs: str) -> Config:
    assert isinstance(method, FourierFT)
    return {
        "n_frequency": len(module.c), "scaling": method.scale, "random_loc_seed": method.seed,
        "n_frequency_pattern": {},
    }  # fmt: skip


def _loha_of(method: Method, module: HadamardProduct, theirs: str) -> Config:
    rank = len(module.A1)
    return {"r": rank, "alpha": tidy(module.scale * rank), "rank_pattern": {}, "alpha_pattern": {}}


def _adalora(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    rank = config.get("init_r", 12)
    return {"rank": rank, "scale": tidy(config.get("lora_alpha", 8) / (rank + ADALORA_EPS))}


def _adalora_of(method: Method, module: Triplets, theirs: str) -> Config:
    assert isinstance(method, AdaLoRA)
    rank, kept = len(module.mask), module.mask.tolist()
    return {
        "init_r": rank, "target_r": max(1, round(method.keep * rank)), "total_step": 1,
        "lora_alpha": tidy(module.scale * (rank + ADALORA_EPS)),
        "rank_pattern": {} if all(kept) else {f"{theirs}.lora_E": kept},
    }  # fmt: skip


def _adalora_taken(
    config: Config, theirs: str, options: dict[str, Any], own: dict[str, Tensor], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """All triplets, zeros where the pattern keeps none."""
    rank, (outputs, inputs) = options["rank"], shape
    kept = config["rank_pattern"].of(f"{theirs}.lora_E", [True] * rank)
    if len(kept) != rank:
        raise AdapterError(
            f"rank_pattern says of {len(kept)} triplets of {theirs} whether they are kept, and init_r is {rank}; save "
            "the adapter again"
        )
    mask = torch.tensor(kept)
    number = int(mask.sum())
    shapes = {"P": (outputs, number), "E": (number, 1), "Q": (number, inputs)}
    P, E, Q = (shaped(f"{theirs}.{ADALORA.keys[name]}", own[name], *shapes[name]) for name in ("P", "E", "Q"))
    whole = {"P": P.new_zeros(outputs, rank), "E": E.new_zeros(rank), "Q": Q.new_zeros(rank, inputs), "mask": mask}
    whole["P"][:, mask], whole["E"][mask], whole["Q"][mask] = P, E[:, 0], Q
    return whole


def _boft(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    size, blocks = config.get("boft_block_size", 4), config.get("boft_block_num", 0)
    factors = config.get("boft_n_butterfly_factor", 1)
    size = inputs // blocks if not size and blocks > 0 else size
    if size < 1 or blocks not in (0, inputs // size) or inputs % (size * 2 ** (factors - 1)):
        raise AdapterError(
            f"boft_block_num={blocks} blocks of boft_block_size={size} with boft_n_butterfly_factor={factors} do not "
            f"fit the {inputs} inputs of {theirs}; one of the first two is 0 in the files of peft"
        )
    return {"block": size, "factors": factors}


def _vblora(config: Config, theirs: str, inputs: int) -> dict[str, Any]:
    vectors, k = config.get("num_vectors", 256), config.get("topk", 2)
    if k > vectors:
        raise AdapterError(
            f"topk={k} of VB-LoRA chooses more vectors than num_vectors={vectors}; save the adapter again"
        )
    return {"rank": config.get("r", 4), "vectors": vectors, "length": config.get("vector_length", 256), "k": k}


def _boft_taken(
    config: Config, theirs: str, options: dict[str, Any], own: dict[str, Tensor], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """The numbers above the diagonal of (R - R^T) / 2."""
    R, (rows, columns) = own["blocks"], torch.triu_indices(options["block"], options["block"], 1)
    return {"blocks": ((R - R.mT) / 2)[..., rows, columns], "s": own["s"][:, 0]}


LOHA = Form(
    "loha", "LOHA", HadamardProduct,
    {"A1": "hada_w1_b", "B1": "hada_w1_a", "A2": "hada_w2_b", "B2": "hada_w2_a"}, _loha_of, _loha,
    lambda options, outputs, inputs: {
        **dict.fromkeys(("A1", "A2"), (options["rank"], inputs)),
        **dict.fromkeys(("B1", "B2"), (outputs, options["rank"])),
    },
)  # fmt: skip
VERA = Form(
    "vera", "VERA", Vectors, {"d": "vera_lambda_d", "b": "vera_lambda_b"}, _vera_of,
    lambda config, theirs, inputs: {"rank": config.get("r", 256), "seed": config.get("projection_prng_key", 0)},
    lambda options, outputs, inputs: {"d": (options["rank"],), "b": (outputs,)},
)  # fmt: skip
FOURIER = Form(
    "fourierft", "FOURIERFT", Spectrum, {"c": "fourierft_spectrum"}, _fourier_of, _fourier,
    lambda options, outputs, inputs: {"c": (options["frequencies"],)},
)  # fmt: skip
OFT = Form(
    "oft", "OFT", Rotation, {"blocks": "oft_R.weight"},
    lambda method, module, theirs: {
        "r": 0, "oft_block_size": module.size, "use_cayley_neumann": False, "coft": False, "block_share": False,
    },
    _oft,
    lambda options, outputs, inputs: {
        "blocks": (inputs // options["block"], options["block"] * (options["block"] - 1) // 2)
    },
)  # fmt: skip
HRA = Form(
    "hra", "HRA", Reflections, {"u": "hra_u"},
    lambda method, module, theirs: {"r": len(module.u), "apply_GS": False}, _hra,
    lambda options, outputs, inputs: {"u": (options["rank"], inputs)}, transposed=True,
)  # fmt: skip
MISS = Form(
    "miss", "MISS", SharedShards, {"D": "miss_block"}, lambda method, module, theirs: {"r": module.D.shape[1]}, _miss,
    lambda options, outputs, inputs: {"D": (outputs, options["rank"])}, transposed=True,
)  # fmt: skip
ADALORA = Form(
    "adalora", "ADALORA", Triplets, {"Q": "lora_A", "P": "lora_B", "E": "lora_E"}, _adalora_of, _adalora,
    lambda options, outputs, inputs: {},
    written=lambda module: {**module.kept(), "E": module.kept()["E"][:, None]}, taken=_adalora_taken,
)  # fmt: skip
BOFT = Form(
    "boft", "BOFT", Butterfly, {"blocks": "boft_R", "s": "boft_s"},
    lambda method, module, theirs: {
        "boft_block_size": module.size, "boft_block_num": 0, "boft_n_butterfly_factor": len(module.blocks),
    },
    _boft,
    lambda options, outputs, inputs: {
        "blocks": (options["factors"], inputs // options["block"], options["block"], options["block"]),
        "s": (outputs, 1),
    },
    written=lambda module: {"blocks": skew(module.blocks, module.size), "s": module.s[:, None]}, taken=_boft_taken,
)  # fmt: skip
VBLORA = Form(
    "vblora", "VBLORA", Admixture, {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"},
    lambda method, module, theirs: {
        "r": len(module.logits_A), "num_vectors": len(module.bank), "vector_length": module.bank.shape[1],
        "topk": module.k, "save_only_topk_weights": False,
    },
    _vblora,
    lambda options, outputs, inputs: {
        "logits_A": (options["rank"], inputs // options["length"], options["vectors"]),
        "logits_B": (outputs // options["length"], options["rank"], options["vectors"]),
        "bank": (options["vectors"], options["length"]),
    },
    shared={"bank": "vblora_vector_bank"},
)  # fmt: skip
