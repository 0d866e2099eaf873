"""Our Triton kernels without a GPU: interpreted against float64 (triton_interpreted.py, in a process of its own), and
compiled for absent cards."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effzoo.attention import triton_launch
from effzoo.errors import OptionError

ROOT = Path(__file__).parent.parent
# bytes that a block can have; those of 8.6 and 8.9, which take the kernels of 8.0
SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; pip install effzoo[triton]"
)


def run(*arguments, interpret, cache):
    own = {
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=os.environ | own, capture_output=True, text=True)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("which", ["hashing or dropout", "not hashing and not dropout"])
def test_kernels_equal_the_definition_in_the_interpreter(which, tmp_path):
    done = run("-m", "pytest", "-x", "-q", "-k", which, "tests/triton_interpreted.py", interpret=True, cache=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


COMPILED = [  # kernel, case, card, width: those that came closest to the limit, and each kernel on each card
    ("forward", "bias", 80, 128),
    ("of_queries", "bias", 80, 64),
    ("of_keys", "window, padded, dropout", 80, 64),
    ("of_columns", "dilated, columns, dropout", 80, 128),
    ("forward", "hashed", 90, 64),
    ("of_queries", "window, columns, padded", 90, 128),
    ("of_keys", "bias", 90, 64),
    ("forward", "window, padded, dropout", 100, 128),
    ("of_queries", "hashed", 100, 64),
    ("of_keys", "hashed", 100, 128),
]


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_cards_without_spills(tmp_path):
    code = (
        f"import json, sys; sys.path.insert(0, 'benchmarks'); import registers\nfor one in {COMPILED!r}: "
        "print(json.dumps(registers.compiled(*one)))"
    )
    done = run("-c", code, interpret=False, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(row["kernel"], row["case"], row["card"], row["width"]) for row in rows] == COMPILED
    for row in rows:
        assert row["spilled"] == 0 and row["registers"] <= 255 and row["shared"] <= SHARED[row["card"]], row


def test_the_register_table_is_that_of_these_kernels():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import registers
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    table = json.loads(registers.RESULTS.read_text())
    assert table["source"] == registers.source(), "the kernels have changed: python benchmarks/registers.py"
    rows = table["rows"]
    assert {(row["card"], row["width"], row["case"]) for row in rows} == {
        (c, w, case) for c in registers.CARDS for w in (64, 128) for case in registers.CASES
    }
    for row in rows:
        hashed = "Order" in registers.CASES[row["case"]]
        assert tuple(row["tiles"]) == triton_launch.tile_sizes(
            row["kernel"], row["width"], 2, divmod(row["card"], 10), hashed
        ), row
        assert row["spilled"] == 0 and row["registers"] <= 255 and row["shared"] <= SHARED[row["card"]], row


def test_on_a_cpu_the_kernels_say_why_not():
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(OptionError, match="run on CUDA, not on cpu|pip install effzoo"):
        triton_launch.OnePass().forward(x, x, x)


@pytest.mark.slow
def test_effzoo_imports_no_triton():
    done = run(
        "-c",
        "import sys, effzoo, effzoo.attention.triton_launch; print('triton' in sys.modules)",
        interpret=False,
        cache="/nowhere",
    )
    loaded = run(
        "-c", "import sys, torch, transformers; print('triton' in sys.modules)", interpret=False, cache="/nowhere"
    )
    assert done.stdout == loaded.stdout, done.stderr
