"""The device that is measured on: whether it is there, what it is called, what it is made of, and what its maker says
that it can do."""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from effzoo.errors import OptionError, UnknownNameError


@dataclass(frozen=True)
class Card:
    """Rates of a device: dense operations a second in half precision (tensor cores, no sparsity) and in float32
    (without TF32), bytes a second of its memory, seconds that one launch of a kernel takes of the host, and where the
    figures are from."""

    name: str
    half: float
    single: float
    bandwidth: float
    launch: float
    source: str

    def rate(self, dtype: str) -> float:
        """Operations a second in a dtype."""
        return self.half if dtype in ("bfloat16", "float16") else self.single


LAUNCH = 5e-6  # of a PyTorch operator in eager mode, Python included; `calibrated` measures it where the code runs
CARDS = {  # the SXM variants
    "A100": Card("A100", 312e12, 19.5e12, 2.039e12, LAUNCH, "NVIDIA A100 datasheet, 80 GB SXM"),
    "H100": Card(
        "H100", 989e12, 67e12, 3.35e12, LAUNCH, "NVIDIA H100 datasheet, SXM (half of the figure with sparsity)"
    ),
    "H200": Card(
        "H200", 989e12, 67e12, 4.8e12, LAUNCH, "NVIDIA H200 datasheet, SXM (half of the figure with sparsity)"
    ),
    "B200": Card("B200", 2250e12, 80e12, 8.0e12, LAUNCH, "NVIDIA Blackwell architecture brief, HGX B200 at 1,000 W"),
}


def real(device: str) -> bool:
    """Whether computations on the device run on what it is called: not so on CUDA that is simulated on the CPU."""
    return torch.device(device).type != "cuda" or (torch.version.cuda or torch.version.hip) is not None


def need(device: str) -> None:
    """Raise OptionError, with what to try, when nothing can be measured on the device."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise OptionError(f"a device is cpu, cuda or cuda:1, got {device!r}")
    if wanted.type == "cpu":
        return
    instead = "or measure on the CPU with device cpu"
    if not real(device):
        raise OptionError(
            f"device {device!r}: this torch, {torch.__version__}, is built without CUDA; install a "
            f"build of torch for CUDA, {instead}"
        )
    if not torch.cuda.is_available():
        raise OptionError(
            f"device {device!r}: torch {torch.__version__} is built for CUDA {torch.version.cuda}, and sees no GPU; "
            "look at nvidia-smi (is there a "
            f"driver, and a card?) and at the variable CUDA_VISIBLE_DEVICES, {instead}"
        )
    if (wanted.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device {device!r}: there are {torch.cuda.device_count()} GPUs, the last one is "
            f"cuda:{torch.cuda.device_count() - 1}"
        )


@functools.cache
def machine(device: str = "cpu") -> str:
    """The processor or the GPU, in words."""
    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = {
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        }
        name = ", ".join(sorted(models)) or name
    return f"{name}, {torch.get_num_threads()} threads"


@functools.cache
def versions(device: str = "cpu") -> dict[str, str]:
    """Of Python and torch; on CUDA also of CUDA, the driver and Triton, and the card's compute capability and
    memory."""
    of_torch = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.device(device).type != "cuda":
        return of_torch
    properties = torch.cuda.get_device_properties(device)
    return of_torch | {
        "cuda": str(torch.version.cuda), "driver": _driver(), "triton": _triton(),
        "capability": f"{properties.major}.{properties.minor}", "memory": f"{properties.total_memory / 2**30:.0f} GiB",
    }  # fmt: skip


def _driver() -> str:
    """The version of NVIDIA's driver, "unknown" where nvidia-smi does not say."""
    if shutil.which("nvidia-smi") is None:
        return "unknown"
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def file_name(device: str) -> str:
    """What files of results are named after: "cpu", or the card, such as "nvidia-h100-80gb-hbm3"."""
    if torch.device(device).type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", machine(device).lower()).strip("-")


def card(name: str) -> Card:
    """The card with this name, such as "H100", or whose name is in this longer one ("NVIDIA H100 80GB HBM3"). Raises
    UnknownNameError."""
    for known, entry in CARDS.items():
        if re.search(rf"\b{known}\b", name, flags=re.IGNORECASE):
            return entry
    raise UnknownNameError("card", name, CARDS)
