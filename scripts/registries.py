"""What other packages have, by their own registries: methods, kinds of attention and masks, by name.

    python scripts/registries.py adapters-1.3.0-py3-none-any.whl ...

writes what the given wheels say to benchmarks/results/registries.json. A wheel is read, not run: its registry is a
dictionary, a list or classes in one of its files. peft and transformers are installed with the tests and are asked
directly (`installed`).
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "registries.json"
FILES: dict[str, dict[str, str | None]] = {
    # package: {file in its wheel: the name of the dictionary or list in it, or None for its public classes}
    "adapters": {"adapters/configuration/adapter_config.py": "ADAPTER_CONFIG_MAP", "adapters/composition.py": None},
    "opendelta": {"opendelta/auto_delta.py": "DELTA_CONFIG_MAPPING"},
    "flash_linear_attention": {"fla/layers/__init__.py": "__all__"},
    "xformers": {"xformers/ops/fmha/attn_bias.py": None},
}

METHODS = {  # ours: the same in other packages, by the name of their registry and, after a comma, an option
    "adalora": {"peft": "ADALORA"},
    "bitfit": {"opendelta": "bitfit"},
    "boft": {"peft": "BOFT"},
    "compacter": {"adapters": "compacter", "opendelta": "compacter"},
    "compacter_plus": {"adapters": "compacter++"},
    "dora": {"peft": "LORA, use_dora", "adapters": "dora"},
    "fourierft": {"peft": "FOURIERFT"},
    "houlsby": {"adapters": "double_seq_bn", "opendelta": "adapter"},
    "fusion": {"adapters": "Fuse"},
    "hra": {"peft": "HRA"},
    "ia3": {"peft": "IA3", "adapters": "ia3"},
    "krona": {"peft": "LOKR"},
    "llama_adapter": {"peft": "ADAPTION_PROMPT"},
    "loha": {"peft": "LOHA"},
    "lora": {"peft": "LORA", "adapters": "lora", "opendelta": "lora"},
    "loreft": {"adapters": "loreft"},
    "mam": {"adapters": "mam"},
    "miss": {"peft": "MISS"},
    "norms": {"peft": "LN_TUNING"},
    "oft": {"peft": "OFT"},
    "p_tuning": {"peft": "P_TUNING"},
    "parallel": {"adapters": "par_bn", "opendelta": "parallel_adapter"},
    "pfeiffer": {"adapters": "seq_bn"},
    "prefix": {"peft": "PREFIX_TUNING", "adapters": "prefix_tuning", "opendelta": "prefix"},
    "prompt": {"peft": "PROMPT_TUNING", "adapters": "prompt_tuning", "opendelta": "soft_prompt"},
    "randlora": {"peft": "RANDLORA"},
    "scaled_parallel": {"adapters": "scaled_par_bn"},
    "tokens": {"peft": "TRAINABLE_TOKENS"},
    "unipelt": {"adapters": "unipelt"},
    "vblora": {"peft": "VBLORA"},
    "vera": {"peft": "VERA", "adapters": "vera"},
}
KINDS = {
    "bigbird": {"transformers": "big_bird"},
    "full": {"transformers": "bert", "flash_linear_attention": "Attention", "xformers": "LowerTriangularMask"},
    "linear": {"flash_linear_attention": "LinearAttention"},
    "local": {"transformers": "reformer"},
    "longformer": {"transformers": "longformer", "xformers": "LocalAttentionFromBottomRightMask"},
    "lsh": {"transformers": "reformer"},
    "nystromformer": {"transformers": "nystromformer"},
    "perceiver": {"transformers": "perceiver"},
}
SAME = {  # of one package: another name of the same
    "adapters": {
        "pfeiffer": "seq_bn", "houlsby": "double_seq_bn", "parallel": "par_bn", "scaled_parallel": "scaled_par_bn",
        "pfeiffer+inv": "seq_bn_inv", "houlsby+inv": "double_seq_bn_inv", "prefix_tuning_flat": "prefix_tuning",
    },
}  # fmt: skip


def names_in(source: str, registry: str | None) -> list[str]:
    """The keys of a dictionary or the items of a list of that name; without a name, the public classes."""
    body = ast.parse(source).body
    if registry is None:
        return [node.name for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == registry:
            held = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts  # type: ignore[attr-defined]
            return [item.value for item in held]
    raise SystemExit(f"the file has no {registry}; see where the registry is now, and mend FILES")


def read(wheel: Path) -> tuple[str, dict[str, object]]:
    """The package of a wheel, its version, and the names of its registry."""
    package, version = wheel.name.split("-")[:2]
    if package not in FILES:
        raise SystemExit(f"{package} is not one of {', '.join(FILES)}; add its file and registry to FILES")
    files = zipfile.ZipFile(wheel)
    names = [
        name for path, registry in FILES[package].items() for name in names_in(files.read(path).decode(), registry)
    ]
    return package, {"version": version, "names": names}


def installed() -> dict[str, dict[str, object]]:
    """The types of adapters of peft, and the types of models of transformers, as installed."""
    import peft
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return {
        "peft": {"version": peft.__version__, "names": [kind.name for kind in peft.PeftType]},
        "transformers": {"version": transformers.__version__, "names": [*CONFIG_MAPPING_NAMES]},
    }


def known() -> dict[str, dict[str, object]]:
    """All registries: those of installed packages as they are, the others as the tracked file says."""
    return {**installed(), **json.loads(RESULTS.read_text())}


def table(ours: Iterable[str], same: Mapping[str, Mapping[str, str]]) -> str:
    """Which of ours other packages have, which are only here, and which of theirs are not here.

    same: of each of ours, its name in other packages; of those that we do not have nothing is said.
    """
    packages = {name: found for name, found in known().items() if any(name in of for of in same.values())}
    here = {name: same[name] for name in sorted(ours) if name in same}
    head = [f"{name} {found['version']}" for name, found in packages.items()]
    rows = [f"| effzoo | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for name, of in here.items():
        cells = (f"`{of[package]}`" if package in of else "" for package in packages)
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    alone = ", ".join(f"`{name}`" for name in sorted(ours) if name not in same)
    said = [f"In none of these registries: {alone}."]
    for package, found in packages.items():
        if package == "transformers":  # of whose models few are named after an attention
            continue
        met = {of[package].split(",")[0] for of in here.values() if package in of}
        others = [name for name in found["names"] if name not in met and name not in SAME.get(package, {})]
        said.append(f"{package} has {len(others)} more: {', '.join(f'`{name}`' for name in others)}.")
    return "\n".join([*rows, "", *said])


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(dict(sorted(read(Path(wheel)) for wheel in sys.argv[1:])), indent=1) + "\n")
