"""Write the tables of READMEs and documentation from the tracked results and the code: python scripts/readme.py. A test
holds the two in step."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

from effzoo import attention, peft, zoo
from effzoo.attention.predicate import FACTS
from effzoo.cli import describe
from effzoo.course import assignments
from effzoo.lab import DECKS, Claim, catalogue
from effzoo.measure import crossovers, rows
from effzoo.measure.figures import against_length
from effzoo.measure.page import crossover_table, finetune_table, markdown, scaling_table
from effzoo.plots import png_bytes
from effzoo.registry import attention as kinds
from effzoo.writing import replace_file

ROOT = Path(__file__).parent.parent
STOPS = [  # the files to read first, and the formula of each
    ("models/longformer.toml", "a model is numbers and names"),
    ("effzoo/attention/reference.py", "softmax(q kᵀ / √d) v"),
    ("effzoo/attention/longformer.py", "the set of keys that a query sees"),
    ("effzoo/blocks/block.py", "x + f(norm(x))"),
    ("effzoo/peft/parameter/lora.py", "W x + s B A x"),
]
GALLERY = [
    ("patterns", "which query sees which key, drawn from the code that runs"),
    ("spectrum", "attention matrices are low in rank"),
    ("unified", "one function of a row computes six methods"),
    ("adapter_spans", "adapters removed from spans of layers"),
    ("routing", "routers with and without balance"),
    ("comparison", "accuracy, share trained, memory"),
]


def demo_table(results: dict) -> str:
    """The demo's comparison as Markdown: methods x lengths, and the differences with their verdicts."""
    demo, settings = load("demo", "scripts"), results["settings"]
    rows, lengths = demo.rows_of(results), sorted({row["tokens"] for row in results["rows"]})
    lines = ["| | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name in (demo.TUNED, demo.FROZEN, demo.TFIDF):
        lines.append(f"| {name} | " + " | ".join(demo.spread(row) for row in rows if row.method == name) + " |")
    longer = ", ".join(f"{100 * share:.1f} % have more than {int(n):,}" for n, share in results["longer"].items())
    draws = " and ".join(f"{count:,} to {name}" for name, count in settings["split"].items())
    whole = f"{results['seconds']:,.0f} s ({results['cpu_seconds']:,.0f} CPU seconds)"
    return "\n".join(
        [
            f"Does the writer like the film? The first {settings['layers']} layers of MiniLM; LoRA trains the last of "
            "them, on the same documents and for as many steps at each length. Attention is full, at "
            f"{lengths[-1]:,} tokens Longformer's (window {demo.WINDOW}). Test accuracy, the mean of "
            f"{settings['splits']} splits (lowest to highest), %:",
            "",
            *lines,
            "",
            "Differences in percentage points, with the 95 % interval (corrected resampled t test: Nadeau and Bengio "
            "2003):",
            "",
            *(f"- {demo.verdict(difference)}" for difference in results["differences"]),
            "",
            f"{results['documents']:,} documents ([movie_reviews]({{data}}), CC BY 4.0), of which {longer} tokens; "
            f"each split draws {draws}. The whole job took {whole} and at most "
            f"{results['peak_memory_bytes'] / 2**30:.2f} GiB, with forward passes in {results['precision']} "
            f"({results['machine']}).",
        ]
    )


def matrix_table(cells: list[dict]) -> str:
    """Methods x attention kinds, a mark for each architecture, and the refusals by reason."""
    marks = {"works": "+", "refused": "-", "fails": "X"}
    methods, kinds, architectures = (
        list(dict.fromkeys(cell[key] for cell in cells)) for key in ("method", "attention", "architecture")
    )
    found = {(cell["method"], cell["attention"], cell["architecture"]): cell["status"] for cell in cells}
    rows: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        row = tuple("".join(marks[found[method, kind, each]] for each in architectures) for kind in kinds)
        rows.setdefault(row, []).append(f"`{method}`")
    lines = [f"| method | {' | '.join(f'`{kind}`' for kind in kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for row, names in sorted(rows.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(row)} |")
    reasons: dict[str, list[dict]] = {}
    for cell in cells:
        if cell["status"] == "refused":
            reasons.setdefault(cell["reason"], []).append(cell)
    refused = [f"- {len(group)}: {reason}" for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1]))]
    tried = f"{len(cells):,} combinations; + works, - is refused, X fails. The refusals:"
    return "\n".join([*lines, "", tried, "", *refused])


def experts_line(cells: list[dict]) -> str:
    """How the same looks with each method as an expert of a routed adapter."""
    count = {status: sum(cell["status"] == status for cell in cells) for status in ("works", "refused", "fails")}
    before = sorted(
        {
            cell["method"]
            for cell in cells
            if cell["status"] == "refused" and cell["reason"].startswith("routed does not")
        }
    )
    named = ", ".join(f"`{name}`" for name in before)
    return (
        f"Each method as an expert, `effzoo matrix --experts` (`routed[of=METHOD, experts=2]`): {len(cells):,} "
        f"combinations, {count['works']:,} work, {count['fails']} fail, {count['refused']} are refused: what is "
        f"refused above, and {named}, whose rows or network are there for all tokens."
    )


def speed_tables(device: str) -> str:
    """Milliseconds of a layer of each kind in training against the length, and the same computation by others."""
    scaling = rows.read(ROOT / f"benchmarks/results/scaling-{device}.jsonl", "scaling")
    peers = rows.read(ROOT / f"benchmarks/results/peers-{device}.jsonl", "peers")
    return "\n".join(
        [
            f"One layer, forward and backward, d = {scaling[0]['dim']}, {scaling[0]['heads']} heads, batch "
            f"{scaling[0]['batch']}, "
            f"{scaling[0]['dtype']}: milliseconds (in times of full attention, the median over rounds in turns).",
            "",
            markdown(scaling_table(scaling, "train")),
            "",
            "| time | peak memory |\n|---|---|",
            "| "
            + " | ".join(
                f"![{what}](../../benchmarks/results/scaling-{device}-{what}.png)" for what in ("time", "memory")
            )
            + " |",
            "",
            "The same computation by others, forward and backward, from the same weights, in turns (median and "
            "quartiles of the ratio):",
            "",
            markdown(load("run").peers_table(peers)),
            "",
            _made([*scaling, *peers]),
        ]
    )


def more_speed_tables(device: str) -> str:
    """Forward passes and decoding, the share of the bound, and training steps of every method."""
    scaling, bound, steps = (
        rows.read(ROOT / f"benchmarks/results/{suite}-{device}.jsonl", suite)
        for suite in ("scaling", "bound", "finetune")
    )
    sizes = steps[0]["sizes"]
    return "\n".join(
        [
            "`scaling`, a forward pass, milliseconds (in times of full attention):",
            "",
            markdown(scaling_table(scaling, "forward")),
            "",
            "`scaling`, the next token of a causal layer with a cache:",
            "",
            markdown(scaling_table(scaling, "decode")),
            "",
            "`bound`, attention alone, forward and backward: share of the bound = time of full attention x share of "
            "pairs / own time.",
            "",
            markdown(load("run").bound_table(bound)),
            "",
            f"`finetune`, a step of a BERT of {sizes['layers']} layers, {sizes['dim']} wide, on {steps[0]['batch']} "
            f"x {steps[0]['length']} tokens:",
            "",
            markdown(finetune_table(steps)),
            "",
            _made([*scaling, *bound, *steps]),
        ]
    )


def predicted_table(card: str) -> str:
    """Crossovers that a card is predicted to have."""
    lines = (ROOT / f"benchmarks/results/predicted-{card}.jsonl").read_text().splitlines()
    return markdown(crossover_table([json.loads(line) for line in lines]))


def _made(found: list[rows.Row]) -> str:
    """On what, and from which commits."""
    return "; ".join(
        sorted({f"{row['machine']}, torch {row['versions']['torch']}, commit {row['commit']}" for row in found})
    )


def figures(device: str) -> None:
    """The two figures of the README."""
    scaling = rows.read(ROOT / f"benchmarks/results/scaling-{device}.jsonl", "scaling")
    for name, what in (("time", "seconds"), ("memory", "peak_bytes")):
        replace_file(
            ROOT / f"benchmarks/results/scaling-{device}-{name}.png", png_bytes(against_length(scaling, "train", what))
        )


def load(name: str, folder: str = "benchmarks") -> ModuleType:
    """A script."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[name] = script  # where dataclasses look for their module
    spec.loader.exec_module(script)
    return script


def rendered(readme: str, up: str = "") -> str:
    """A page with the demo's figures written anew; up: from its folder to the root."""
    table = demo_table(json.loads((ROOT / "benchmarks/results/demo.json").read_text()))
    return _between(readme, "demo", table.format(data=f"{up}data/README.md"))


def kinds_page(page: str) -> str:
    """Every attention kind with its picture, what it can do and its options, and who else has it."""
    registries = load("registries", "scripts")
    page = _between(page, "others", registries.table(attention.names(), registries.KINDS))
    return _between(
        page, "kinds", "\n\n".join(map(kind_section, sorted(attention.names(), key=lambda name: name != "full")))
    )


def kind_section(name: str) -> str:
    """One attention kind."""
    cls = attention.get(name)
    causal = f"no: {cls.not_causal}" if cls.not_causal else "yes"
    facts = {
        "cost": cls.cost.replace("*", "·").replace("^2", "²"),
        "attention matrix": f"{describe.dimensions(cls)} (of a head)",
        "causal": causal,
        "cache for decoding": "yes" if cls.decodes() else "no",
        "global tokens": "yes" if cls.knows_globals() else "no",
    }
    lines = [
        f"### {name}",
        "",
        f"![what {name} sees](../pictures/kind-{name}.png)",
        "",
        _escaped(describe.summary(cls)),
        "",
    ]
    lines += [f"- {fact}: {what}" for fact, what in facts.items()]
    lines += ["", f"{cls.paper}."]
    if options := describe.option_rows(kinds, name):
        lines += ["", "| option | default | is |", "|---|---|---|"]
        lines += [f"| `{option}` | `{default}` | {_escaped(meaning)} |" for option, _, default, meaning in options]
    return "\n".join(lines)


def methods_page(page: str) -> str:
    """Every method by what it composes with, and the matrix of methods and kinds."""
    for group in ("parameter", "input", "function", "combined", "modular"):
        page = _between(page, f"methods-{group}", methods_table(group))
    tried, experts = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()) for name in ("matrix", "matrix-experts")
    )
    registries = load("registries", "scripts")
    others = registries.table(peft.names(), registries.METHODS)
    page = _between(page, "others", f"{others}\n\n{files_of_peft()}")
    page = _between(page, "peft-counts", load("peft_counts", "scripts").table())
    return _between(page, "matrix", f"{matrix_table(tried)}\n\n{experts_line(experts)}")


def files_of_peft() -> str:
    """Which types of adapters of the package peft go to and from its files."""
    from effzoo.convert.peft_files.counterparts import COUNTERPARTS

    read = [kind for counterpart in COUNTERPARTS for kind in counterpart.peft_types]
    kinds = ", ".join(f"`{kind}`" for kind in dict.fromkeys(read))
    return f"Files of peft go both ways for {kinds}; what it has not is saved in files of our own."


def methods_table(group: str) -> str:
    """The methods of one package: what each computes, and where it is from."""
    lines = ["| method | computes | paper |", "|---|---|---|"]
    for name in peft.names():
        cls = peft.get(name)
        if cls.__module__.split(".")[2] == group:
            first = re.split(r"(?<=[^\s.])\.(?= [A-Z`])", describe.summary(cls))[0].removesuffix(".")
            lines.append(f"| `{name}` | {_escaped(first)} | {_escaped(cls.paper)} |")
    return "\n".join(lines)


def models_page(page: str) -> str:
    """Every entry of the zoo with its sizes."""
    lines = ["| model | architecture | attention | layers x width | length | paper |", "|---|---|---|---|---|---|"]
    for name in zoo.models():
        config = zoo.config(name)
        attending = describe.kinds(config.attention)
        size = f"{config.layers} x {config.dim:,}"
        lines.append(
            f"| `{name}` | {config.architecture} | {attending} | {size} | {config.max_length:,} | "
            f"{_escaped(config.paper)} |"
        )
    return _between(page, "models", "\n".join(lines))


def speed_page(page: str) -> str:
    """The tables of speed, and the demo."""
    return _between(rendered(page, "../../"), "speed", speed_tables("cpu"))


def lab_page(page: str) -> str:
    """The gallery."""
    return _between(page, "gallery", gallery())


def kind_guide(page: str) -> str:
    """What a predicate may ask for."""
    rows = [f"| `{name}` | {what} |" for name, what in FACTS.items()]
    return _between(page, "facts", "\n".join(["| parameter | is |", "|---|---|", *rows]))


def _escaped(text: str) -> str:
    """A sentence for a cell of a table: outside backticks nothing in it is markup."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if number % 2 else re.sub(r"([<*_\[\]])", r"\\\1", part) for number, part in enumerate(parts))


def rendered_benchmarks(readme: str) -> str:
    """The README of the benchmarks with the tables that the scripts make of their results."""
    for name in ("methods", "methods_longer", "long_sequences"):
        script = load(name.removesuffix("_longer"))
        readme = _between(
            readme, name, script.tracked_table(json.loads((ROOT / f"benchmarks/results/{name}.json").read_text()))
        )
    readme = _between(readme, "lab", lab_table(lab_results()))
    readme = _between(readme, "predicted", predicted_table("h100"))
    return _between(readme, "speed", more_speed_tables("cpu"))


def lab_results() -> dict[str, dict]:
    """The tracked runs of the lab, by name, in the order of `effzoo lab`."""
    found = {name: ROOT / f"benchmarks/results/lab/{name}/result.json" for name in catalogue()}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def lab_table(results: dict[str, dict]) -> str:
    """Every tracked run in one table, with what was seen of what papers say."""
    lines = [
        "| experiment | deck | question | size, CPU seconds | what papers say should be seen |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        claims = "<br>".join(f"{Claim.read(claim).verdict}: {claim['text']}" for claim in result["claims"])
        decks = ", ".join(map(str, result["decks"]))
        size = "quick" if result["quick"] else "standard"
        lines.append(
            f"| [`{name}`](results/lab/{name}/table.md) | {decks} | {result['about']} | "
            f"{size}, {result['cpu_seconds']:.0f} | {claims} |"
        )
    claims = [Claim.read(claim) for result in results.values() for claim in result["claims"]]
    verdicts = [claim.verdict for claim in claims]
    seen, never, untold = (verdicts.count(verdict) for verdict in ("seen", "NOT seen", "cannot be told"))
    intervals = sum(claim.interval is not None for claim in claims)
    once = sum(claim.measured_once for claim in claims)
    first = next(iter(results.values()))
    commits = ", ".join(sorted({result["commit"] for result in results.values()}))
    return "\n".join(
        [
            *lines,
            "",
            f"Of {len(claims)} claims {seen} were seen, {never} were not, and {untold} ({untold / len(claims):.0%}) "
            f"cannot be told at this size. {intervals} are judged by the 95 % interval of a difference over seeds, "
            f"{once} were measured once, and {len(claims) - intervals - once} are computed to rounding or counted. "
            f"{first['machine']}, torch {first['versions']['torch']}, commits {commits}.",
        ]
    )


def gallery() -> str:
    """Six figures of the lab, each with what it shows."""
    return "\n\n".join(
        f"## {said[0].upper()}{said[1:]}\n\n[`effzoo lab {name}`](../benchmarks/results/lab/{name}/table.md)\n\n"
        f"![{said}](../benchmarks/results/lab/{name}/figure.png)"
        for name, said in GALLERY
    )


def lecture_page(deck: dict, results: dict[str, dict]) -> str:
    """What the slides of a deck show and where it is, then the deck's experiments with what was seen."""
    number = deck["number"]
    lines = [f"# Deck {number}: {DECKS[number]}", "", "In the order of the slides.", ""]
    lines += ["| on the slide | found here | run | read |", "|---|---|---|---|"]
    for slide in deck["slide"]:
        commands = "<br>".join(f"`{command}`" for command in slide["run"])
        read = f"[`{Path(slide['code']).name}`](../../{slide['code']})"
        lines.append(f"| {slide['topic']} | {slide.get('answer', '')} | {commands} | {read} |")
    if number == 4:
        lines += ["", "## When savings show", "", savings()]
    mine = [one for one in assignments().values() if one.deck == "all" or str(number) in re.findall(r"\d", one.deck)]
    starts = "; ".join(f"`effzoo course start {one.name}`, {one.title}" for one in mine)
    lines += ["", f"Assignments ([the course](../../docs/howto/teach.md)): {starts}."]
    for name, result in results.items():
        if number in catalogue()[name].decks:
            lines += ["", f"## {name}", "", result["about"], "", f"![{name}](../results/lab/{name}/figure.png)", ""]
            lines += [f"- {Claim.read(claim)}" for claim in result["claims"]]
            lines += [
                "",
                f"[Tables and notes](../results/lab/{name}/table.md), [numbers](../results/lab/{name}/result.json). "
                f"Source: {result['source']}.",
            ]
    return (
        "\n".join(
            [*lines, "", "The other decks: " + ", ".join(f"[{n}](deck-{n}.md)" for n in DECKS if n != number) + "."]
        )
        + "\n"
    )


def savings() -> str:
    """From which length on a kind is faster than full attention, and takes less memory: measured, and predicted."""
    scaling = rows.read(ROOT / "benchmarks/results/scaling-cpu.jsonl", "scaling")
    memory = {(row["attention"], row["n"]): row["peak_bytes"] for row in scaling if row["mode"] == "train"}
    longest = max(n for _, n in memory)
    table = [
        ["attention", *(f"{mode}, faster from" for mode in ("forward", "train")), f"memory at {longest:,}, of full"]
    ]
    crossing = crossovers(scaling)
    for kind in dict.fromkeys(row["attention"] for row in scaling if row["attention"] != "full"):
        lengths = (crossing.get((kind, mode)) for mode in ("forward", "train"))
        share = memory[kind, longest] / memory["full", longest]
        table.append([f"`{kind}`", *("nowhere" if n is None else f"{n:,}" for n in lengths), f"{share:.2f}"])
    return "\n".join(
        [
            "One layer of width 512 on this CPU, [measured](../../docs/zoo/speed.md). In time savings show, from a "
            "length on that depends on the kind. In memory they do not, and the lecture is right: full attention by a "
            "fused kernel keeps no n x n matrix, and takes as little.",
            "",
            markdown(table),
            "",
            "An H100, predicted from operations and bytes, not measured:",
            "",
            predicted_table("h100"),
        ]
    )


def lecture_pages() -> dict[str, str]:
    """The page of every deck, by the name of its file."""
    decks = tomllib.loads((ROOT / "benchmarks/lectures.toml").read_text())["deck"]
    results = lab_results()
    return {f"deck-{deck['number']}.md": lecture_page(deck, results) for deck in decks}


def _between(text: str, name: str, table: str) -> str:
    return re.sub(
        rf"<!-- {name} -->.*?<!-- /{name} -->",
        lambda _: f"<!-- {name} -->\n{table}\n<!-- /{name} -->",
        text,
        flags=re.DOTALL,
    )


def course_page(page: str) -> str:
    """The page on teaching with the table of the assignments."""
    rows = [
        f"| {one.name} | {one.deck} | [{one.title}](../../{one.folder.relative_to(ROOT)}/README.md) | {one.of} | "
        f"{one.minutes} |"
        for one in assignments().values()
    ]
    head = ["| | deck | what the student writes | points | minutes |", "|---|---|---|---|---|"]
    return _between(page, "assignments", "\n".join([*head, *rows]))


def house_page(page: str) -> str:
    """The concept page of the house with the lines of the files to read."""
    lines = [len((ROOT / path).read_text().splitlines()) for path, _ in STOPS]
    rows = [
        f"| [`{path}`](../../{path}) | {shows} | {count} |" for (path, shows), count in zip(STOPS, lines, strict=True)
    ]
    total = f"| together | | {sum(lines)} |"
    return _between(page, "stops", "\n".join(["| file | shows | lines |", "|---|---|---|", *rows, total]))


PAGES = {  # with tables of results or of code, and what writes them
    "README.md": rendered,
    "benchmarks/README.md": rendered_benchmarks,
    "docs/zoo/kinds.md": kinds_page,
    "docs/zoo/methods.md": methods_page,
    "docs/zoo/models.md": models_page,
    "docs/zoo/speed.md": speed_page,
    "docs/lab.md": lab_page,
    "docs/concepts/house.md": house_page,
    "docs/howto/write-a-kind.md": kind_guide,
    "docs/howto/teach.md": course_page,
}

if __name__ == "__main__":
    figures("cpu")
    for path, render in PAGES.items():
        replace_file(ROOT / path, render((ROOT / path).read_text()).encode())
    for name, text in lecture_pages().items():
        replace_file(ROOT / "benchmarks/lectures" / name, text.encode())
