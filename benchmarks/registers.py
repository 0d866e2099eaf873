"""What the Triton kernels take of a card, without one: compiled ahead of time, registers, spills and shared memory of
each are read from the binary.

    python benchmarks/registers.py            # writes results/registers.json (minutes)

Cards: capability 8.0 (A100), 9.0 (H100) and 10.0 (B200). Needs the extra `triton`.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "registers.json"
CARDS = (80, 90, 100)
KERNELS = ("forward", "of_queries", "of_keys", "of_columns")
POINTERS = {
    "KeyMask": "*u8", "Columns": "*i32", "Order": "*i32", "Place": "*i32", "Buckets": "*i16", "Lse": "*fp32",
    "Delta": "*fp32",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {  # the arguments that are there, the flags that are set, and numbers that are not 1
    "full": {},
    "padded, causal": {"KeyMask": 1, "CAUSAL": True},
    "window, padded, dropout": {"KeyMask": 1, "WINDOW": True, "DROPOUT": True},
    "window, columns, padded": {"KeyMask": 1, "Columns": 1, "WINDOW": True},
    "dilated, columns, dropout": {"Columns": 1, "KeyMask": 1, "WINDOW": True, "DROPOUT": True, "dilation": None},
    "chunks, causal": {"WINDOW": True, "CAUSAL": True, "chunk": None},
    "bias": {"Bias": 1, "BIAS_ROWS": True},
    "hashed": {"KeyMask": 1, "Order": 1, "Buckets": 1, "WINDOW": True, "ITSELF": False, "chunk": None},
    "hashed, once": {
        "KeyMask": 1,
        "Order": 1,
        "Buckets": 1,
        "Place": 1,
        "WINDOW": True,
        "ITSELF": False,
        "chunk": None,
    },
}


def compiled(kernel: str, case: str, card: int, width: int, dtype: str = "bf16", tiles: Any = None) -> dict[str, Any]:
    """Registers of a thread, spilled bytes and shared memory of one kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from effzoo.attention import triton_kernels
    from effzoo.attention.triton_launch import REGISTERS, tile_sizes

    given = CASES[case] | ({"Columns": None} if kernel == "of_keys" else {})
    if kernel == "of_columns":  # a launch of their own
        given = {"Columns": 1, "DROPOUT": given.get("DROPOUT", False)}
    size = tiles or tile_sizes(kernel, width, 4 if dtype == "fp32" else 2, divmod(card, 10), "Order" in given)
    flags = {
        "CAUSAL": False, "ITSELF": True, "WINDOW": False, "BIAS_ROWS": False, "DROPOUT": False,
        "RESUME": "Order" in given, "ADD": "Order" in given,
    }  # fmt: skip
    constants = dict.fromkeys(("D", "BD", "E", "BE"), width)
    constants |= {"BM": size.queries, "BN": size.keys, "PRECISION": "ieee", "dilation": 1}
    constants |= flags | {"chunk": 1} | given
    constants = {name: value for name, value in constants.items() if value is not None}
    fn = triton_kernels.of_keys if kernel == "of_columns" else getattr(triton_kernels, kernel)
    signature, constexprs, attributes = {}, {}, {}
    for place, name in enumerate(fn.arg_names):
        optional = name in ("Bias", "KeyMask", "Columns", "Order", "Place", "Buckets")
        if (name in constants and not optional) or (optional and not given.get(name)):
            signature[name], constexprs[(place,)] = "constexpr", None if optional else constants[name]
        elif name[0].isupper():
            summed = name in ("DK", "DV", "DQ", "Out") and ("Order" in given or kernel == "of_columns")
            signature[name] = POINTERS.get(name, "*fp32" if summed else f"*{dtype}")
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if signature[name][0] == "*" or name.endswith(("_batch", "_head", "_row")):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": size.warps, "num_stages": size.stages, "maxnreg": REGISTERS}
    binary = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    registers, stack, local = _usage(binary.asm["cubin"], Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump")
    return {
        "card": card, "kernel": kernel, "case": case, "width": width, "dtype": dtype, "tiles": list(size),
        "registers": registers, "spilled": max(stack, local), "shared": binary.metadata.shared,
    }  # fmt: skip


def _usage(cubin: bytes, tool: Path) -> tuple[int, int, int]:
    """Registers, stack and local bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing of registers: {said}")
    return int(usage[1]), int(usage[2]), int(usage[3])


def source() -> str:
    """A hash of the kernels' code, without docstrings, comments and line breaks."""
    tree = ast.parse((ROOT / "effzoo" / "attention" / "triton_kernels.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def main() -> None:
    import triton

    rows = []
    for card, width, case, kernel in itertools.product(CARDS, (64, 128), CASES, KERNELS):
        if kernel != "of_columns" or "Columns" in CASES[case]:
            rows.append(compiled(kernel, case, card, width))
            print(*rows[-1].values(), flush=True)
    head = f'"triton": "{triton.__version__}", "source": "{source()}"'
    RESULTS.write_text(f'{{{head}, "rows": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]}\n")


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 compiles nothing; unset it")
    main()
