"""The state of a model's adapters, in one object that prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from effzoo.peft.state import adapters_of, label_layers
from effzoo.peft.training import said
from effzoo.sites import sites, unwrap


@dataclass(frozen=True)
class Tensors:
    """The tensors of one owner at sites of one role.

    owner: "base", or an adapter.
    role: of the sites.
    tensors, numbers: how many.
    trainable_tensors, trainable_numbers: how many of these are trainable.
    dtypes: of the tensors.
    """

    owner: str
    role: str
    tensors: int
    numbers: int
    trainable_tensors: int
    trainable_numbers: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """Which adapters a model has, and what they do.

    attached: {name: spec}, in the order in which they were attached.
    active: in the order in which they act.
    combine: "stack", "average" or "rows".
    rows: the adapter of each row of the batch, where they are chosen by row.
    scales: of the active ones.
    trainable: the adapters of which some tensor is.
    merged: the last one last; they can be taken out in the reverse order.
    finished: without what only training needed.
    frozen: how many base parameters attaching froze.
    tensors: by owner ("base", or the adapter) and role; what several share counts where it comes first.
    untouched: {tensor: why}, trainable tensors that got no gradient in the last training; None before any.
    stages: {adapter: {method: stage}} of those in the middle of a training in stages.
    labels: how many the task head that acts distinguishes; None for a task without.
    heads: what the head of the base and of each adapter is for, as in "3 labels" or "regression" (a number).
    """

    attached: Mapping[str, str]
    active: tuple[str, ...]
    combine: str
    rows: tuple[str | None, ...] | None
    scales: Mapping[str, float]
    trainable: tuple[str, ...]
    merged: tuple[str, ...]
    finished: tuple[str, ...]
    frozen: int
    tensors: tuple[Tensors, ...]
    untouched: Mapping[str, str] | None = None
    stages: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    labels: int | None = None
    heads: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"attached   {', '.join(f'{name} ({spec})' for name, spec in self.attached.items()) or '(none)'}"]
        acts = [name if self.scales[name] == 1 else f"{self.scales[name]:g} {name}" for name in self.active]
        between = {"stack": " then ", "average": " and ", "rows": ", "}[self.combine]
        by_row = ", ".join(name or "-" for name in self.rows or ())
        how = {"stack": "", "average": ", the mean of them", "rows": f", by row: {by_row}"}[self.combine]
        lines.append(f"active     {between.join(acts) or '(none: the bare base)'}{how}")
        lines.append(f"trainable  {', '.join(self.trainable) or '(none)'}")
        if len(set(self.heads.values())) > 1:
            lines.append(
                f"heads      {', '.join(f'{name}: {what}' for name, what in self.heads.items())}; now {self.labels}"
            )
        if self.merged:
            lines.append(f"merged     {', '.join(self.merged)}")
        if self.finished:
            lines.append(f"finished   {', '.join(self.finished)}")
        if self.stages:
            lines.append(f"stages     {', '.join(f'{name} in {said(begun)}' for name, begun in self.stages.items())}")
        width = max((len(f"{one.owner} {one.role}") for one in self.tensors), default=0)
        for one in self.tensors:
            trained = f", {one.trainable_tensors} of them and {one.trainable_numbers:,} trainable"
            lines.append(
                f"  {f'{one.owner} {one.role}':{width}}  {one.tensors:4} tensors {one.numbers:>13,} numbers, "
                f"{' '.join(one.dtypes)}{trained if one.trainable_tensors else ''}"
            )
        if self.untouched is not None:
            count = f"{len(self.untouched)} trainable tensors got no gradient"
            lines.append(f"untouched  {count if self.untouched else '(none)'}")
            lines += [f"  {tensor}: {why}" for tensor, why in self.untouched.items()]
        return "\n".join(lines)


def status(model: nn.Module) -> Status:
    """Which adapters are attached, active, trainable and merged, and all tensors by owner and role.

    Nothing is changed; wrappers of torch are seen through. Raises AdapterError for what is no model.
    """
    model, state = unwrap(model), adapters_of(model)
    now = state.roster.now
    role_of = {path: site.role for path, site in sites(model)}
    grouped: dict[tuple[str, str], list[nn.Parameter]] = {}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in model.named_parameters():
        path, adapters, rest = key.partition(".adapters.")
        owner = rest.partition(".")[0] if adapters else "base"
        role = role_of.get(path if adapters else key.rpartition(".")[0], "(elsewhere)")
        grouped.setdefault((owner, role), []).append(parameter)
    order = ["base", *state.attachments]
    tensors = tuple(
        Tensors(
            owner, role, len(parameters), sum(p.numel() for p in parameters), sum(p.requires_grad for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            tuple(dict.fromkeys(str(p.dtype).removeprefix("torch.") for p in parameters)),
        )
        for (owner, role), parameters in sorted(grouped.items(), key=lambda item: order.index(item[0][0]))
    )  # fmt: skip
    heads = {}
    for site in label_layers(model).values():
        outputs = {"base": site.out_features} | {name: site.outputs(name) for name in state.attachments}
        heads = {name: _purpose(model, count) for name, count in outputs.items()}
    untouched = state.untouched
    return Status(
        attached={name: attachment.spec for name, attachment in state.attachments.items()},
        active=now.names, combine=now.combine, rows=now.by_row(), scales=dict(zip(now.names, now.scales, strict=True)),
        trainable=tuple(
            name for name in state.attachments if any(one.owner == name and one.trainable_tensors for one in tensors)
        ),
        merged=tuple(record.name for record in state.merged),
        finished=tuple(name for name, attachment in state.attachments.items() if attachment.finished),
        stages={name: dict(attachment.begun) for name, attachment in state.attachments.items() if attachment.begun},
        frozen=len(state.frozen), tensors=tensors, heads=heads,
        labels=next((site.outputs_now() for site in label_layers(model).values()), None),
        untouched=None if untouched is None else {key: why for key, why in untouched.items() if key in trained},
    )  # fmt: skip


def _purpose(model: nn.Module, outputs: int) -> str:
    """What a task head with so many outputs is for."""
    if outputs == 1 and getattr(model, "task", "") == "classification":
        return "regression"
    return f"{outputs} label{'s' * (outputs != 1)}"
