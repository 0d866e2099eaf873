"""LoHa, VeRA, FourierFT, OFT, HRA and MiSS in the files of peft: one linear layer of theirs is one of ours.

What both compute is the same function of the same tensors, under other names; `Form` says which, and what of a config
is which option. What is drawn is drawn alike: VeRA's matrices and the places of FourierFT follow from a seed in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effzoo.convert.peft_files.twin import Config, Modules, Twin, Wanted, Written, shaped, tidy
from effzoo.errors import AdapterError
from effzoo.peft import Method, PeftModule
from effzoo.peft.parameter.fourierft import FourierFT, Spectrum
from effzoo.peft.parameter.loha import HadamardProduct
from effzoo.peft.parameter.miss import SharedShards
from effzoo.peft.parameter.rotations import Reflections, Rotation
from effzoo.peft.parameter.vera import Vectors, VeRA
from effzoo.sites import Linear


@dataclass(frozen=True)
class Form:
    """One method in both libraries.

    method, peft_type: its names.
    module: ours.
    keys: {our tensor: the end of their key}.
    transposed: whether their tensors are ours transposed.
    config: (method, module) -> what their config says of a module.
    options: (config, their module, inputs) -> our options.
    shapes: (our options, outputs, inputs) -> the shape of each of our tensors.
    """

    method: str
    peft_type: str
    module: type[PeftModule]
    keys: Mapping[str, str]
    config: Callable[[Method, Any], Config]
    options: Callable[[Config, str, int], dict[str, Any]]
    shapes: Callable[[dict[str, Any], int, int], dict[str, tuple[int, ...]]]
    transposed: bool = False

    @property
    def marks(self) -> tuple[str, ...]:
        """What the last part of a key begins with."""
        return tuple(key.partition(".")[0] for key in self.keys.values())

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
            for ours, theirs in self.keys.items():
                tensor = getattr(module, ours)
                out.tensors[f"{rule.theirs}.{theirs}"] = tensor.T if self.transposed else tensor
            if isinstance(module, Rotation) and module.left:
                raise AdapterError(
                    f"oft on {path}: blocks of {module.size} do not divide its {module.inputs} inputs, and peft has no "
                    "smaller block at the end; give a block that divides them"
                )
            said[rule.theirs] = self.config(methods[0], module)
        out.config = {"peft_type": self.peft_type, "target_modules": out.targets, **next(iter(said.values()))}
        for theirs, own in said.items():
            if own != {key: out.config[key] for key in own}:
                raise AdapterError(
                    f"{self.method}: the config of peft has one {own} for all sites, and {theirs} has another; give "
                    "its sites the same options"
                )
        return out

    def read(
        self, twin: Twin, config: Config, tensors: Mapping[str, Tensor], parts: Mapping[str, list[int]]
    ) -> dict[str, Wanted]:
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
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
            options = self.options(config, theirs, inputs)
            for name, shape in self.shapes(options, outputs, inputs).items():
                shaped(f"{theirs}.{self.keys[name]}", own[name], *shape)
            wanted[path] = Wanted(self.method, options, own)
        _check_one_size(self, twin, wanted)
        return wanted


def _check_one_size(form: Form, twin: Twin, wanted: Mapping[str, Wanted]) -> None:
    """AdapterError for VeRA whose sites have other layers for each role, and other sizes: each part would then draw
    matrices of its own size, where peft draws those of the largest for all."""
    if form.method != "vera":
        return
    layers: dict[str, set[int | None]] = {}
    for path in wanted:
        layers.setdefault(twin.sites[path].role, set()).add(twin.sites[path].layer)
    sizes = {tuple(twin.weight(path).shape) for path in wanted}
    if len(sizes) > 1 and len({frozenset(those) for those in layers.values()}) > 1:
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
    for field in ("coft", "block_share"):
        if config.get(field):
            raise AdapterError(f"{field}=true of OFT has no counterpart in effzoo; train without it")
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


def _vera_of(method: Method, module: Vectors) -> Config:
    assert isinstance(method, VeRA)
    return {
        "r": method.rank, "projection_prng_key": method.seed, "save_projection": False, "d_initial": method.start,
    }  # fmt: skip


def _fourier_of(method: Method, module: Spectrum) -> Config:
    assert isinstance(method, FourierFT)
    return {
        "n_frequency": len(module.c), "scaling": method.scale, "random_loc_seed": method.seed,
        "n_frequency_pattern": {},
    }  # fmt: skip


def _loha_of(method: Method, module: HadamardProduct) -> Config:
    rank = len(module.A1)
    return {"r": rank, "alpha": tidy(module.scale * rank), "rank_pattern": {}, "alpha_pattern": {}}


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
    lambda method, module: {
        "r": 0, "oft_block_size": module.size, "use_cayley_neumann": False, "coft": False, "block_share": False,
    },
    _oft,
    lambda options, outputs, inputs: {
        "blocks": (inputs // options["block"], options["block"] * (options["block"] - 1) // 2)
    },
)  # fmt: skip
HRA = Form(
    "hra", "HRA", Reflections, {"u": "hra_u"}, lambda method, module: {"r": len(module.u), "apply_GS": False}, _hra,
    lambda options, outputs, inputs: {"u": (options["rank"], inputs)}, transposed=True,
)  # fmt: skip
MISS = Form(
    "miss", "MISS", SharedShards, {"D": "miss_block"}, lambda method, module: {"r": module.D.shape[1]}, _miss,
    lambda options, outputs, inputs: {"D": (outputs, options["rank"])}, transposed=True,
)  # fmt: skip
