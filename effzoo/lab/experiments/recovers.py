"""What LoRA recovers as its rank grows, and what an adapter does: full fine-tuning, and an MLP."""

from __future__ import annotations

from statistics import mean

from effzoo.lab.analyses.recovery import Target, adapter_error, low_rank_error, teacher
from effzoo.lab.draw import band, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment

DIM, SIZES = 16, (1, 2, 4, 8, 16)
TARGETS: tuple[Target, ...] = ("full", "mlp")
TITLES: dict[Target, str] = {"full": "full fine-tuning", "mlp": "an MLP behind it"}


@experiment("recovers", deck=4, source="Hu et al. 2021, LoRA, arXiv:2106.09685, section 4.1")
def recovers(run: Run) -> Findings:
    """As r grows, does LoRA recover full fine-tuning, and an adapter an MLP?

    One frozen layer y = W x. Target one is the layer after full fine-tuning, (W + D) x with D of full rank; target two
    is the layer with an MLP behind it, W x + V tanh(U W x). LoRA changes the layer, the adapter follows it.
    """
    steps = run.choose(1000, 4000)
    found: dict[tuple[Target, str], list[list[float]]] = {}
    for seed in run.seeds:
        for target in TARGETS:
            data = teacher(DIM, target, seed)
            found.setdefault((target, "LoRA"), []).append([low_rank_error(data, r) for r in SIZES])
            errors = [adapter_error(data, a, steps=steps, seed=seed) for a in SIZES]
            found.setdefault((target, "adapter"), []).append(errors)
        run.say(f"seed {seed}: " + ", ".join(f"{t} {m} {of[-1][-1]:.1e}" for (t, m), of in found.items()))
    head = ["target", "method", *(f"r = {size}" for size in SIZES)]
    table: Table = [head]
    for (target, method), by_seed in found.items():
        table.append([TITLES[target], method, *(f"{mean(values):.2e}" for values in zip(*by_seed, strict=True))])
    last = {key: [errors[-1] for errors in by_seed] for key, by_seed in found.items()}
    first = {key: [errors[0] for errors in by_seed] for key, by_seed in found.items()}
    claims = [
        Claim.law(
            "at r = d LoRA is the change of full fine-tuning (error below 1e-10 of the change)",
            [error < 1e-10 for error in last["full", "LoRA"]],
        ),
        Claim.of_differences(
            f"LoRA at r = d is no MLP: its error is above the adapter's at inner width {DIM}",
            [a - b for a, b in zip(last["mlp", "LoRA"], last["mlp", "adapter"], strict=True)],
        ),
        Claim.of_differences(
            f"an adapter gets nearer to an MLP as its inner width grows, from 1 to {DIM}",
            [a - b for a, b in zip(first["mlp", "adapter"], last["mlp", "adapter"], strict=True)],
        ),
        Claim.of_differences(
            "LoRA gets nearer to full fine-tuning as its rank grows, from 1 to d / 2",
            [errors[0] - errors[SIZES.index(DIM // 2)] for errors in found["full", "LoRA"]],
        ),
    ]
    figure, axes = panels(2, sharey=True)
    for panel, target in zip(axes, TARGETS, strict=True):
        for number, method in enumerate(("LoRA", "adapter")):
            floored = [[max(error, 1e-12) for error in errors] for errors in found[target, method]]
            band(panel, SIZES, floored, method, number)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set(xlabel="rank, inner width", ylabel="error, of the change", title=f"the target is {TITLES[target]}")
        panel.legend(frameon=False)
    return Findings(
        tables={"The squared error that is left, as a share of the change": table},
        figure=figure,
        claims=claims,
        values={f"{target}, {method}": by_seed for (target, method), by_seed in found.items()},
        settings={"d": DIM, "steps of an adapter": steps, "sizes": list(SIZES)},
        notes=[
            "Inputs are drawn from a normal distribution of variance 1. The best LoRA is computed, not trained: the "
            "singular vectors of the change, or for the MLP those of the best linear map (Eckart and Young). The "
            "adapter "
            "W x + W_up tanh(W_down W x) is trained with Adam on 2,048 inputs and counted on 2,048 others.",
            "Seeds draw W, the target and the inputs. An adapter is no linear map: at the same size it does not reach "
            "full fine-tuning exactly, however long it is trained.",
        ],
    )  # fmt: skip
