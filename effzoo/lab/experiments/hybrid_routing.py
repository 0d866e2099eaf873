"""Hybrid routing: modules of a language chosen by its number, modules of a task by a learned router."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean

import torch

import effzoo
from effzoo.architectures import Transformer
from effzoo.lab.analyses.tagger import composed, right, tagger
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Batch, fit

SYMBOLS, LANGUAGES, TASKS, LENGTH, BATCH, UNITS = 16, 4, 4, 15, 32, 8
GIVEN, LEARNED = f"router='skills[tasks={LANGUAGES * TASKS}]'", "router=soft, level=example"
WAYS = {  # router of the languages' modules, and of the tasks'
    "all fixed": (GIVEN, GIVEN),
    "hybrid: language fixed, task learned": (GIVEN, LEARNED),
    "all learned": (LEARNED, LEARNED),
}
ONE = "one shared module"


@experiment(
    "hybrid_routing", deck=3,
    source="Pfeiffer et al. 2023, Modular deep learning, arXiv:2302.11529, section 4",
)  # fmt: skip
def hybrid_routing(run: Run) -> Findings:
    """Do modules fixed by language and learned by task do better than one shared module?

    A sequence is in one of four languages and asks for one of four tasks; label q_t(p_l(s)) of symbol s needs both.
    Four modules of languages stand behind the attention of each layer, four of tasks behind its feed-forward. Nobody
    says the task: the learned router reads the mean state of the sequence.
    """
    steps = run.choose(60, 150)
    accuracy: dict[str, list[float]] = {name: [] for name in (*WAYS, ONE)}
    sizes: dict[str, int] = {}
    for seed in run.seeds:
        torch.manual_seed(seed)
        base = _model()
        fit(base, _stream(seed, variant=1), 200, learning_rate=3e-3, bfloat16=False)
        test = composed(512, LENGTH, SYMBOLS, LANGUAGES, TASKS, torch.Generator().manual_seed(10**6 + seed))
        for name in accuracy:
            torch.manual_seed(seed)
            model = _model()
            model.load_state_dict(base.state_dict())
            _attach(model, name)
            sizes[name] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            fit(model, _stream(seed + 1000), steps, learning_rate=5e-3, bfloat16=False)
            accuracy[name].append(right(model, *test))
        run.say(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.2f}" for name, values in accuracy.items()))
    table: Table = [["modules", "trained", "accuracy, %", "lowest seed", "highest seed", "published"]]
    table += [
        [name, f"{sizes[name]:,}", *(f"{100 * x:.1f}" for x in (mean(of), min(of), max(of))), "no number"]
        for name, of in accuracy.items()
    ]
    fixed, hybrid, learned = (accuracy[name] for name in WAYS)
    claims = [
        Claim.of_differences(
            "the hybrid is better than one shared module of the same size in all",
            [a - b for a, b in zip(hybrid, accuracy[ONE], strict=True)],
        ),
        Claim.of_differences(
            "the hybrid is better than routers that learn both", [a - b for a, b in zip(hybrid, learned, strict=True)]
        ),
        Claim.of_differences(
            "the hybrid gets more than half of what fixed modules gain over the shared one",
            [h - (f + one) / 2 for h, f, one in zip(hybrid, fixed, accuracy[ONE], strict=True)],
        ),
    ]
    figure, (axes,) = panels(1, width=7.2, height=3.2)
    for place, (name, of) in enumerate(accuracy.items()):
        axes.barh(place, 100 * mean(of), color=LINES[0] if name != ONE else "#999999", alpha=0.75)
        axes.scatter([100 * x for x in of], [place] * len(of), color="black", s=10, zorder=3)
    axes.axvline(100 / SYMBOLS, color="#666666", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(accuracy)), list(accuracy))
    axes.invert_yaxis()
    axes.set(xlabel="labels found, % (dots: seeds; dashed: chance)", xlim=(0, 100))
    return Findings(
        tables={"Accuracy on new sequences": table},
        figure=figure,
        claims=claims,
        values={"accuracy": accuracy, "trained": sizes},
        settings={
            "languages": LANGUAGES, "tasks": TASKS, "symbols": SYMBOLS, "length": LENGTH, "batch": BATCH,
            "steps": steps, "units of a module": UNITS, "layers": 2, "dim": 64,
        },
        notes=[
            "Sequences begin with a mark of their language and one of their task. The base is trained on other "
            "permutations, then frozen but for its head; a module is an adapter of 8 units, and the shared one has as "
            "many units at each place as its four modules together. Fixed choices are tables of skills that are "
            "given and not trained. Seeds draw weights and the sequences to train and to test "
            "on; the permutations are the same.",
        ],
    )  # fmt: skip


def _model() -> Transformer:
    return tagger(SYMBOLS, LANGUAGES + TASKS, LENGTH + 2)


def _attach(model: Transformer, way: str) -> None:
    """The modules of one way; tables that are given send pair l T + t to module l, or t."""
    if way == ONE:
        effzoo.attach(model, f"pfeiffer[bottleneck={4 * UNITS}, targets=(attn.branch, mlp.branch)]")
        return
    pairs = torch.arange(LANGUAGES * TASKS)
    given = {"language": pairs // TASKS, "task": pairs % TASKS}
    for name, router, site in zip(given, WAYS[way], ("attn.branch", "mlp.branch"), strict=True):
        module = f"pfeiffer[bottleneck={UNITS}, targets={site}]"
        effzoo.attach(model, f"routed[of='{module}', experts=4, {router}]", name=name)
    effzoo.activate(model, *given)
    for path, parameter in model.named_parameters():
        if path.endswith("router.table"):
            name = path.split(".adapters.")[1].split(".")[0]
            parameter.requires_grad_(False).fill_(-20.0)
            parameter[pairs, given[name]] = 20.0


def _stream(seed: int, variant: int = 0) -> Iterator[Batch]:
    """Batches without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        ids, labels, pair = composed(BATCH, LENGTH, SYMBOLS, LANGUAGES, TASKS, draw, variant=variant)
        yield {"input_ids": ids, "labels": labels, "task_ids": pair}
