"""The processes of a run: how the model is spread over them, and sums over all of them."""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.parallel import DistributedDataParallel

from effzoo.architectures import Transformer
from effzoo.devices import on_cpu
from effzoo.errors import IncompatibleError, OptionError
from effzoo.parallel import OverRanks
from effzoo.sharding import is_sharded, is_split, is_unit, shard
from effzoo.train.settings import Saving


class Processes:
    """What `accelerate launch` started; one process where it did not.

    number, index: how many there are, and which of them this is.
    main: whether this one writes and reports.
    device: of this process.
    sequence_ranks: processes that compute each sequence together. Those with neighbouring numbers do, and are given
        the same batches: of `batch_sharers` sets of them, this process belongs to number `share`.
    sharded: whether each process holds rows of the model's parameters only.
    """

    def __init__(self, saving: Saving, directory: Path, sequence_ranks: int = 1):
        self.plugin = _plugin()
        found = torch.distributed.is_initialized()
        self.accelerator = Accelerator(cpu=on_cpu(), log_with=saving.trackers or None, project_dir=directory)
        self._began_group = torch.distributed.is_initialized() and not found
        self.number, self.index = self.accelerator.num_processes, self.accelerator.process_index
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if self.number % sequence_ranks:
            raise OptionError(
                f"sequence_ranks={sequence_ranks} processes compute a sequence together, and {self.number} processes "
                f"were started, which is no multiple of it; accelerate launch --num_processes {sequence_ranks}"
            )
        self.sequence_ranks, self.batch_sharers = sequence_ranks, self.number // sequence_ranks
        self.share, self.place_in_sequence = divmod(self.index, sequence_ranks)
        kind = self.device.type
        if sequence_ranks > 1:
            shape, axes = (self.batch_sharers, sequence_ranks), ("data", "sequence")
            self.sequence = init_device_mesh(kind, shape, mesh_dim_names=axes)["sequence"].get_group()
        self.sharded = False  # until a model is split
        self.mesh = init_device_mesh(kind, (self.number,)) if self.plugin is not None else None

    @property
    def in_step(self) -> bool:
        """Whether forward passes wait for those of other processes."""
        return self.sharded or self.sequence_ranks > 1

    def spread(self, model: Transformer) -> OverRanks | None:
        """The model over the processes that compute a sequence together; None where each computes its own.

        Raises IncompatibleError for a model whose sequences cannot be spread.
        """
        return OverRanks(model, self.sequence) if self.sequence_ranks > 1 else None

    def place(self, model: nn.Module) -> None:
        """Put a model on the device of this process, or split it over all of them."""
        if self.plugin is not None:
            offload = isinstance(self.plugin.cpu_offload, CPUOffloadPolicy)
            split = next(filter(is_split, model.parameters()), None)
            if offload and split is not None and split.device.type != "cpu":
                raise IncompatibleError(
                    "fsdp_offload_params keeps rows on the CPU, and this model was split before, with its rows on "
                    f"{split.device}; leave one of the two out"
                )
            shard(model, self.mesh, offload=offload)
        self.sharded = is_sharded(model)
        if not self.sharded:
            model.to(self.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all processes."""
        if self.number == 1 or self.in_step:
            return module
        gc.collect()  # a wrapper of the stage before would average as well
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)

    def no_sync(self, module: nn.Module) -> AbstractContextManager[None]:
        """Gradients stay in their process."""
        if self.in_step:
            return _unsynchronised(module)
        return cast(Any, module).no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients that no wrapper does: of whole parameters beside split ones, and over sequences.

        One that some process has no gradient of counts as zero there; one that none has keeps none.
        """
        if not self.in_step:
            return
        alone = [parameter for parameter in parameters if not is_split(parameter)]
        has = torch.tensor([parameter.grad is not None for parameter in alone], device=self.device).int()
        torch.distributed.all_reduce(has, torch.distributed.ReduceOp.MAX)
        reached = [parameter for parameter, reached in zip(alone, has.tolist(), strict=True) if reached]
        for dtype in {parameter.dtype for parameter in reached}:
            same = [parameter for parameter in reached if parameter.dtype == dtype]
            zeros = (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in same)
            flat = torch.cat([gradient.flatten() for gradient in zeros])
            torch.distributed.all_reduce(flat)
            parts = (flat / self.number).split([parameter.numel() for parameter in same])
            for parameter, part in zip(same, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def here(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch on the device of this process."""
        return {key: x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for key, x in batch.items()}

    def total(self, x: Tensor) -> Tensor:
        """The sum of a number over all processes, on the device."""
        return cast(Tensor, self.accelerator.reduce(x.to(self.device), "sum"))

    def mean(self, x: Tensor) -> float:
        """The mean of a number over all processes."""
        return self.total(x).item() / self.number

    def gathered(self, value: Any) -> list[Any]:
        """The value of each process, in order."""
        return cast("list[Any]", gather_object([value]))

    def wait(self) -> None:
        """Until all processes are here."""
        self.accelerator.wait_for_everyone()

    def end_group_at_exit(self) -> None:
        """Where this run began the process group, end it before the interpreter goes.

        A thread of gloo that lets go of a tensor while the interpreter ends aborts its process, so a run that is done
        would count as failed.
        """
        if self._began_group:
            atexit.register(end_group)

    def begin_tracking(self, name: str, settings: Mapping[str, Any]) -> None:
        """Start the trackers of `Saving(log_with=...)` with the settings that are numbers or texts."""
        plain = {key: value for key, value in settings.items() if isinstance(value, bool | int | float | str)}
        self.accelerator.init_trackers(name, plain)

    def end_tracking(self) -> None:
        """Close the trackers."""
        for tracker in self.accelerator.trackers if self.main else ():
            tracker.finish()  # accelerate's end_training also ends the process group

    def track(self, values: Mapping[str, Any], step: int) -> None:
        """Give measured values to the trackers of `Saving(log_with=...)`."""
        self.accelerator.log(dict(values), step=step)


def end_group() -> None:
    """End the process group, and let threads of gloo finish that still wait for the interpreter."""
    torch.distributed.destroy_process_group()
    time.sleep(0.2)  # destroying does not wait for them


def _plugin() -> Any:
    """The FSDP settings of `accelerate launch`; None without.

    accelerate itself ignores them on a CPU, and runs DistributedDataParallel there.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise IncompatibleError(
            "accelerate was launched with DeepSpeed: after its backward pass no parameter has a gradient (ZeRO 1 to "
            "3), and between steps no weight is there (ZeRO 3), so finetune could not name what the loss does not "
            "reach, and would save empty adapters; take FSDP (accelerate launch --use_fsdp --fsdp_version 2), which "
            "splits the same"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise IncompatibleError(
            f"accelerate was launched with FSDP version {plugin.fsdp_version}, which flattens parameters; give "
            "--fsdp_version 2 (fsdp_version: 2 in a config file)"
        )
    return plugin


@contextmanager
def _unsynchronised(module: nn.Module) -> Iterator[None]:
    """Gradients of a split model stay in their process."""
    split = [unit for unit in module.modules() if is_unit(unit)]
    for unit in split:
        cast(Any, unit).set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for unit in split:
            cast(Any, unit).set_requires_gradient_sync(True, recurse=False)
