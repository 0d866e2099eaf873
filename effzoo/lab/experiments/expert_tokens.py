"""What experts specialise in: the tokens before a prediction that each of them sees most."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import effzoo
from effzoo import data, zoo
from effzoo.lab.analyses.expert_use import chosen, counts, information
from effzoo.lab.draw import LINES, panels
from effzoo.lab.experiment import Claim, Findings, Run, Table, experiment
from effzoo.lab.fit import Batch, fit
from effzoo.lab.texts import DATA, texts

EXPERTS, VOCAB, LENGTH, TOP = 8, 1000, 64, 6
ROUTERS = ("switch[balance=0.1]", "base")


@experiment("expert_tokens", deck=3, source="Lewis et al. 2021, BASE layers, arXiv:2103.16716, section 5.2", data=DATA)
def expert_tokens(run: Run) -> Findings:
    """Which tokens does each expert of a small language model see most?

    A decoder of two layers, whose second feed-forward is eight experts, learns news texts of the 999 most frequent
    pieces of words; all others are one token.
    """
    steps, batch = run.choose(80, 160), 16
    found = texts(run, length=LENGTH + 2, train=1200, test=400)
    ids = torch.cat([part.inputs["input_ids"] for part in (found.train, found.test)])
    full = torch.cat([part.inputs["attention_mask"] for part in (found.train, found.test)]).all(dim=1)
    ids = ids[full][:, 1:-1]
    frequent = torch.bincount(ids.flatten()).argsort(descending=True)[: VOCAB - 1]
    known = torch.zeros(int(ids.max()) + 1, dtype=torch.long)
    known[frequent] = torch.arange(1, VOCAB)
    ids, words = known[ids], ["other", *_words(frequent)]
    bits: dict[str, list[list[float]]] = {router: [] for router in ROUTERS}  # learned, new and shuffled
    tables: dict[str, Tensor] = {}
    for seed in run.seeds:
        places = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        training, testing = ids[places[300:]], ids[places[:300]]
        for router in ROUTERS:
            torch.manual_seed(seed)
            model: Any = effzoo.build(
                "gpt2", task="causal_lm", layers=2, dim=64, heads=4, mlp=128, vocab=VOCAB, max_length=LENGTH,
                dropout=0.0, attention_dropout=0.0, experts=EXPERTS, router=router,
            )  # fmt: skip
            before = _bits(model, testing)
            fit(model, _stream(training, batch, seed), steps, learning_rate=3e-3, bfloat16=False)
            experts = chosen(model, testing)[-1]
            table = counts(experts, testing, EXPERTS, VOCAB)
            mixed = experts.flatten()[torch.randperm(experts.numel(), generator=torch.Generator().manual_seed(seed))]
            by_chance = information(counts(mixed.view_as(experts), testing, EXPERTS, VOCAB))
            bits[router].append([information(table), before, by_chance])
            tables.setdefault(router, table)
        run.say(f"seed {seed}: " + ", ".join(f"{r} {of[-1][0]:.2f} bits" for r, of in bits.items()))
    shown: Table = [["expert", "its share, %", "the tokens that it sees most, of all that see them"]]
    for expert, row in enumerate(tables[ROUTERS[0]]):
        top = row.argsort(descending=True)[:TOP]
        shares = row[top] / tables[ROUTERS[0]].sum(dim=0)[top].clamp(min=1)
        said = ", ".join(f"{words[t]} {100 * s:.0f} %" for t, s in zip(top.tolist(), shares.tolist(), strict=True))
        shown.append([f"{expert}", f"{100 * float(row.sum() / tables[ROUTERS[0]].sum()):.0f}", said])
    kinds = ("trained", "not trained", "experts shuffled")
    measured: Table = [["router", *kinds]]
    measured += [[r, *(f"{mean(of):.2f}" for of in zip(*bits[r], strict=True))] for r in ROUTERS]
    claims = [
        Claim.of_differences(
            f"experts specialise in tokens: more bits than with experts shuffled ({router.partition('[')[0]})",
            [learned - shuffled for learned, _, shuffled in bits[router]],
        )
        for router in ROUTERS
    ] + [
        Claim.of_differences(
            f"training makes them specialise more than drawn weights do ({router.partition('[')[0]})",
            [learned - before for learned, before, _ in bits[router]],
        )
        for router in ROUTERS
    ]
    figure, (axes,) = panels(1, width=6.4)
    for number, kind in enumerate(kinds):
        for place, router in enumerate(ROUTERS):
            values = [of[number] for of in bits[router]]
            at = place + 0.27 * (number - 1)
            axes.barh(at, mean(values), height=0.25, color=LINES[number], alpha=0.75, label=None if place else kind)
            axes.scatter(values, [at] * len(values), color="black", s=8, zorder=3)
    axes.set_yticks(range(len(ROUTERS)), [router.partition("[")[0] for router in ROUTERS])
    axes.invert_yaxis()
    axes.set(xlabel="bits that an expert tells of its token (3 at most)")
    axes.legend(frameon=False, fontsize=8)
    return Findings(
        tables={f"The experts of switch, seed {run.seeds[0]}": shown, "Bits of the token in its expert": measured},
        figure=figure,
        claims=claims,
        values={"bits": bits},
        settings={"steps": steps, "batch": batch, "length": LENGTH, "vocab": VOCAB, "experts": EXPERTS, "test": 300},
        notes=[
            "Counted on texts that training never saw, by the token that stands before the prediction: it is what the "
            "expert sees. Eight experts that are used alike tell at most 3 bits. A router with drawn weights tells "
            "some, as states of one token are alike. Seeds draw weights and the split of the texts.",
        ],
    )  # fmt: skip


def _words(pieces: Tensor) -> list[str]:
    tokenizer = data.tokenizer_of(zoo.config("minilm"))
    return [str(piece) for piece in tokenizer.convert_ids_to_tokens(pieces.tolist())]


def _bits(model: Any, ids: Tensor) -> float:
    return information(counts(chosen(model, ids)[-1], ids, EXPERTS, VOCAB))


def _stream(ids: Tensor, size: int, seed: int) -> Iterator[Batch]:
    """Batches of a language model without end."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows = ids[torch.randint(len(ids), (size,), generator=draw)]
        yield {"input_ids": rows, "labels": rows}
