"""Write the tables of READMEs and documentation from the tracked results and the code: python scripts/readme.py. A test
holds the two in step."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
from pathlib import Path
from types import ModuleType

from effzoo import attention, peft, zoo
from effzoo.attention.predicate import FACTS
from effzoo.cli import describe
from effzoo.lab import DECKS, Claim, catalogue
from effzoo.measure import rows
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
    """The demo's comparison as Markdown."""
    lines = ["| | tokens read | test accuracy | correct | trainable | seconds |", "|---|---|---|---|---|---|"]
    for row in results["rows"]:
        share = row["correct"] / row["test"]
        interval = 1.96 * (share * (1 - share) / row["test"]) ** 0.5
        lines.append(
            f"| {row['name']} | {row['tokens']:,} | {100 * share:.2f} ± {100 * interval:.2f} % | {row['correct']} / "
            f"{row['test']} | {row['trainable']:,} | {row['seconds']:.0f} |"
        )
    account, settings = results["account"], results["settings"]
    documents = ", ".join(f"{count:,} {name}" for name, count in settings["split"].items())
    return "\n".join(
        [
            "MiniLM (6 layers, 384 wide) on BBC News in five classes, one run of `./scripts/demo` on CPU; "
            "± is a 95 % binomial interval, and the rows differ by less:",
            "",
            *lines,
            "",
            f"{documents} documents, each text once; {100 * results['longer_than_512']:.0f} % of the test documents "
            f"are longer than 512 tokens. LoRA and head: {account['trainable']:,} of {account['total']:,} parameters "
            f"({account['percent']:.3f} %), {account['bytes_on_disk']:,} bytes on disk. The whole job took "
            f"{results['seconds']:.0f} s and at most {results['peak_memory_bytes'] / 2**30:.2f} GiB, with forward "
            f"passes in {results['precision']} ({results['machine']}).",
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


def load(name: str) -> ModuleType:
    """A script of the benchmarks."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def rendered(readme: str) -> str:
    """The README with its figures written anew."""
    return _between(readme, "demo", demo_table(json.loads((ROOT / "benchmarks/results/demo.json").read_text())))


def kinds_page(page: str) -> str:
    """Every attention kind with its picture, what it can do and its options."""
    return _between(
        page, "kinds", "\n\n".join(map(kind_section, sorted(attention.names(), key=lambda name: name != "full")))
    )


def kind_section(name: str) -> str:
    """One attention kind."""
    cls = attention.get(name)
    causal = f"no: {cls.not_causal}" if cls.not_causal else "yes"
    facts = {
        "cost": cls.cost.replace("*", "·").replace("^2", "²"),
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
    return _between(page, "matrix", f"{matrix_table(tried)}\n\n{experts_line(experts)}")


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
    return _between(rendered(page), "speed", speed_tables("cpu"))


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
    """The tracked quick runs of the lab, by name, in the order of `effzoo lab`."""
    found = {name: ROOT / f"benchmarks/results/lab/{name}/result.json" for name in catalogue()}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def lab_table(results: dict[str, dict]) -> str:
    """Every quick run in one table, with what was seen of what papers say."""
    lines = ["| experiment | deck | question | CPU seconds | claims seen, of seeds |", "|---|---|---|---|---|"]
    for name, result in results.items():
        claims = "<br>".join(f"{sum(claim['held'])}/{len(claim['held'])} {claim['text']}" for claim in result["claims"])
        decks = ", ".join(map(str, result["decks"]))
        lines.append(
            f"| [`{name}`](results/lab/{name}/table.md) | {decks} | {result['about']} | "
            f"{result['cpu_seconds']:.0f} | {claims} |"
        )
    held = [all(claim["held"]) for result in results.values() for claim in result["claims"]]
    never = [not any(claim["held"]) for result in results.values() for claim in result["claims"]]
    first = next(iter(results.values()))
    commits = ", ".join(sorted({result["commit"] for result in results.values()}))
    return "\n".join(
        [
            *lines,
            "",
            f"Of {len(held)} claims {sum(held)} were seen with every seed, {sum(never)} with none, "
            f"{len(held) - sum(held) - sum(never)} with some. "
            f"Quick sizes; {first['machine']}, torch {first['versions']['torch']}, commits {commits}.",
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
    lines = [f"# Deck {number}: {DECKS[number]}", "", "| on the slides | run | read |", "|---|---|---|"]
    for slide in deck["slide"]:
        commands = "<br>".join(f"`{command}`" for command in slide["run"])
        lines.append(f"| {slide['topic']} | {commands} | [`{slide['code']}`](../../{slide['code']}) |")
    for name, result in results.items():
        if number in result["decks"]:
            lines += ["", f"## {name}", "", result["about"], "", f"![{name}](../results/lab/{name}/figure.png)", ""]
            lines += [f"- {Claim(claim['text'], tuple(claim['held']))}" for claim in result["claims"]]
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
}

if __name__ == "__main__":
    figures("cpu")
    for path, render in PAGES.items():
        replace_file(ROOT / path, render((ROOT / path).read_text()).encode())
    for name, text in lecture_pages().items():
        replace_file(ROOT / "benchmarks/lectures" / name, text.encode())
