"""Parameters that are split over processes with torch's FSDP2: each process holds some rows of every tensor.

Outside of a forward and backward pass a parameter is then a DTensor. What reads or changes single weights (saving,
merging, attaching) asks here for the whole tensor, and every process has to ask at the same time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effzoo.devices import on_cpu
from effzoo.errors import FileError, IncompatibleError

M = TypeVar("M", bound=nn.Module)


def all_processes(wanted: str | None) -> Any:
    """The mesh over which `shard="full"` splits a model while it is read, that of `finetune`; None for `shard=None`.

    Raises IncompatibleError where no process group was begun.
    """
    from torch.distributed.device_mesh import init_device_mesh

    if wanted is None:
        return None
    if not torch.distributed.is_initialized():
        raise IncompatibleError(
            f"shard={wanted!r} has each process read its part of the weights, and this one knows of no others; start "
            "the script with accelerate launch or torchrun, and call torch.distributed.init_process_group() first, or "
            "leave shard out"
        )
    kind = "cpu" if on_cpu() else torch.accelerator.current_accelerator().type  # type: ignore[union-attr]
    return init_device_mesh(kind, (torch.distributed.get_world_size(),))


@contextmanager
def together(mesh: Any) -> Iterator[None]:
    """An error of one process inside the `with` block, which exchanges nothing, is an error of all behind it.

    mesh: of the processes; None for this one alone.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    said: list[Any] = []
    if mesh is not None:
        said = [None] * mesh.size()
        torch.distributed.all_gather_object(said, error and str(error), group=mesh.get_group())
    if error is not None:
        raise error
    for number, message in enumerate(said):
        if message is not None:
            raise FileError(f"process {number} could not read its part of the model: {message}")


def shard(model: M, mesh: Any = None, *, offload: bool = False) -> M:
    """Split the base of a model over processes, each block as one unit and the rest as another; return the model.

    Adapters stay whole in every process: they are small, and what methods do to them in training (masks, pruning,
    averages) sees all of a tensor. Gradients of the base are averaged by FSDP2, those of adapters by whoever trains.
    A reversible model is one unit, because its blocks are computed again in the backward pass.

    mesh: a torch.distributed.device_mesh.DeviceMesh of one axis; None for all processes.
    offload: keep the rows on the CPU, and bring them to the GPU block by block.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    if is_sharded(model):
        return model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise IncompatibleError(
            "an encoder-decoder is not split over processes: its stacks share the embedding, which is outside the "
            "blocks of both; train it whole in each process"
        )
    whole = {parameter for name, parameter in model.named_parameters() if ".adapters." in f".{name}"}
    pinned = torch.accelerator.is_available()
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    reversible = getattr(getattr(model, "config", None), "residual", "plain") == "reversible"
    blocks = () if reversible else dict.fromkeys(cast(Any, getattr(model, "blocks", ())))
    for unit in (*blocks, model):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=whole, offload_policy=policy)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter of the model is split over processes."""
    return any(map(is_split, model.parameters()))


def writes(model: nn.Module) -> bool:
    """Whether this process writes the files of a model: the first of those over which it is split."""
    split = next(filter(is_split, model.parameters()), None)
    return split is None or cast(Any, split).device_mesh.get_local_rank() == 0


def is_unit(module: nn.Module) -> bool:
    """Whether a module is one whose parameters FSDP2 brings together and splits again."""
    return hasattr(module, "set_requires_gradient_sync")


def class_of(module: nn.Module) -> type:
    """The class of a module as it was written; FSDP2 puts another in front of it."""
    return type(module).__mro__[2] if is_unit(module) else type(module)


def is_split(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; a tensor that is not split is returned as it is."""
    return cast(Any, tensor).full_tensor() if is_split(tensor) else tensor


def rows_here(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this process holds, to be read or changed, and the number of the first.

    Raises IncompatibleError for a tensor that is split in another way than FSDP2 does.
    """
    if not is_split(tensor):
        return tensor, 0
    split = cast(Any, tensor)
    if len(split.placements) != 1 or not split.placements[0].is_shard(dim=0):
        raise IncompatibleError(f"a tensor is split as {split.placements}; only rows over one axis of a mesh are known")
    processes, number = split.device_mesh.size(), split.device_mesh.get_local_rank()
    first = min(number * -(-len(tensor) // processes), len(tensor))
    return split.to_local(), first


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """The rows of a whole tensor that this process holds of `like`; all of them, where that is not split."""
    if not is_split(like):
        return tensor
    rows, first = rows_here(like.detach())
    return tensor[first : first + len(rows)]


def group_of(tensor: Tensor) -> Any:
    """The process group over which a tensor is split."""
    return cast(Any, tensor).device_mesh.get_group()


def split_like(read: Callable[[int, int], Tensor], like: Tensor) -> Tensor:
    """A tensor that is split as another one of its shape; `read(first, end)` gives the rows of this process."""
    from torch.distributed.tensor import DTensor

    rows, first = rows_here(like.detach())
    here = read(first, first + len(rows)).to(rows.device)
    split = cast(Any, like)
    return DTensor.from_local(
        here, split.device_mesh, split.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def reshard(model: nn.Module) -> None:
    """Give up what a forward pass may have left whole, so that parameters are what the optimizer changes."""
    for module in model.modules():
        if is_unit(module):
            cast(Any, module).reshard()


@contextmanager
def gathered(model: nn.Module, part: str = "") -> Iterator[None]:
    """Every parameter whole inside the `with` block, in every process; afterwards each keeps its rows of them.

    What is written to them, and whether they are trainable, stays. Each process needs the memory of all of them.

    part: text that the path of a module contains whose parameters are meant, such as ".adapters.default".
    """
    reshard(model)
    with _exchanged(model, part, lambda parameter: whole(parameter).clone()) as made:
        try:
            yield
        finally:
            for parameter, now in made.items():
                rows_here(parameter.detach())[0].copy_(part_of(now.detach(), parameter))
                parameter.requires_grad_(now.requires_grad)


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block whoever reads a parameter that is split is given all of it, which is let go afterwards.

    So every process needs the memory of one parameter, and what asks for a shape exchanges nothing. All processes have
    to read the same, in the same order. Whether a parameter is trainable stays as it is set; writing is refused.
    """
    reshard(model)
    with _exchanged(model, "", Brought.of) as made:
        try:
            yield
        finally:
            for parameter, now in made.items():
                parameter.requires_grad_(now.requires_grad)


class Brought(Tensor):
    """A parameter that is split over processes: each operation brings all of it together, its results are whole."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    rows: Tensor

    @staticmethod
    def of(split: Tensor) -> Brought:
        made: Brought = Tensor._make_wrapper_subclass(Brought, split.shape, dtype=split.dtype, device=split.device)
        made.rows = split
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.aten.detach.default:
            return Brought.of(args[0].rows)
        of_shape = func in _OF_SHAPE or torch.device(kwargs.get("device") or "cpu").type == "meta"
        if of_shape and kwargs.get("device") is None:
            kwargs["device"] = args[0].device
        for position, argument in enumerate(func._schema.arguments):
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, Brought) and argument.alias_info is not None and argument.alias_info.is_write:
                raise IncompatibleError("this parameter is split over processes, and here it can be read alone")
        make = _shape_of if of_shape else (lambda brought: whole(brought.rows))
        args, kwargs = pytree.tree_map_only(Brought, make, (args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Brought({tuple(self.shape)})"


_OF_SHAPE = {
    getattr(torch.ops.aten, name).default
    for name in (
        "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros",
        "new_ones", "new_full",
    )
}  # fmt: skip


def _shape_of(brought: Brought) -> Tensor:
    return torch.empty(brought.shape, dtype=brought.dtype, device="meta")


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block modules are of the classes that were written, without hooks and what else FSDP2 hangs on
    them: they can be copied, and compute with the parameters that they have."""
    units = [(module, type(module), vars(module)) for module in model.modules() if is_unit(module)]
    hung = [
        {key: value for key, value in attributes.items() if key.startswith(("__composable", "_forward_"))}
        for _, _, attributes in units
    ]
    for (module, _, attributes), aside in zip(units, hung, strict=True):
        module.__class__ = class_of(module)
        for key, value in aside.items():
            if isinstance(value, dict) and key.startswith("_forward_"):
                attributes[key] = OrderedDict()
            else:
                del attributes[key]
    try:
        yield
    finally:
        for (module, cls, attributes), aside in zip(units, hung, strict=True):
            module.__class__ = cls
            attributes.update(aside)


@contextmanager
def counted(model: nn.Module) -> Iterator[None]:
    """Every parameter that is split has its whole shape inside the `with` block, and zeros that need no memory."""
    with _exchanged(model, "", lambda x: torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)):
        yield


@contextmanager
def _exchanged(model: nn.Module, part: str, make: Callable[[Tensor], Tensor]) -> Iterator[dict[Tensor, nn.Parameter]]:
    """Parameters that are split, as keys, exchanged for others inside the `with` block."""
    places = [
        (module, key, parameter)
        for path, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None and is_split(parameter) and part in f".{path}"
    ]
    made: dict[Tensor, nn.Parameter] = {}
    for module, key, parameter in places:
        if parameter not in made:
            made[parameter] = nn.Parameter(make(parameter.detach()), requires_grad=parameter.requires_grad)
        module._parameters[key] = made[parameter]
    try:
        yield made
    finally:
        for module, key, parameter in places:
            if module._parameters.get(key) is made[parameter]:
                module._parameters[key] = parameter


def some(tensor: Tensor, holds: Callable[[Tensor], Tensor]) -> bool:
    """Whether something holds for a number of a tensor, in whichever process it lies."""
    found = holds(rows_here(tensor)[0]).any()
    if is_split(tensor):
        found = found.int()
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group_of(tensor))
    return bool(found)
