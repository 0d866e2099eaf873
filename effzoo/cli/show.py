"""`effzoo models`, `attention`, `peft`, `routers`, `show` and `account`: what there is, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from effzoo import plots, zoo
from effzoo.architectures import Transformer
from effzoo.arguments import whole
from effzoo.cli import describe
from effzoo.cli.own import File, loaded
from effzoo.cli.terminal import app, console, heading, pairs, say, table
from effzoo.errors import OptionError, UnknownNameError
from effzoo.folder.loading import load as load_folder
from effzoo.peft import account as account_of
from effzoo.peft import attached
from effzoo.peft.survey import REMARKS
from effzoo.peft.survey import survey as survey_of
from effzoo.registry import View, attention, peft
from effzoo.registry import router as routing
from effzoo.routing import Router
from effzoo.sites import Site
from effzoo.spec import Spec, parse_one
from effzoo.writing import replace_file

LOSSES = ("importance", "load", "balance", "z")
Attention = Annotated[
    str | None, typer.Option(help='Attention kind instead of the model\'s own, such as "longformer\\[window=256]".')
]
Peft = Annotated[
    str | None, typer.Option(help='Fine-tuning method, such as "lora\\[rank=4]"; several are joined by "|".')
]


@app.command("models")
def models_() -> None:
    """List the models of the zoo.

    Example:  effzoo models
    """
    columns = ["model", "architecture", "parameters", "attention", "length"]
    wide = console().width >= 96  # for who wrote it
    listed = table(*columns, *["paper"] * wide, right=("parameters", "length"))
    for name in zoo.models():
        config = zoo.config(name)
        kinds = describe.kinds(config.attention)
        row = [name, config.architecture, f"{describe.parameters(name):,}", kinds, f"{config.max_length:,}"]
        listed.add_row(*map(Text, [*row, *[_short(config.paper)] * wide]))
    say(listed, "\neffzoo show NAME tells more.")


@app.command("attention")
def attention_() -> None:
    """List the attention kinds.

    Example:  effzoo attention
    """
    listed = table("attention", "cost", "causal", "globals", "what it computes")
    for name in attention.names():
        cls = attention.get(name)
        row = (name, cls.cost, _yes(not cls.not_causal), _yes(cls.knows_globals()), describe.first_sentence(cls))
        listed.add_row(*map(Text, row))
    say(listed, "\neffzoo show NAME draws which query sees which key.")


@app.command("peft")
def peft_() -> None:
    """List the parameter-efficient fine-tuning methods.

    Example:  effzoo peft
    """
    listed = table("method", "trained", "of BERT", "merges", "what it computes", right=("trained", "of BERT"))
    for name in peft.names():
        hung = describe.hung(Spec(name))
        counted = (
            ("-", "-", "-")
            if hung is None
            else (f"{hung.on_bert.trainable:,}", f"{hung.on_bert.percent:.3g} %", _yes(hung.mergeable))
        )
        row = (name, *counted, describe.first_sentence(peft.get(name)))
        listed.add_row(*map(Text, row))
    say(
        listed,
        "\ntrained: parameters on BERT base with default options; without a task head, except for `head`. "
        "effzoo show NAME tells more.",
    )


@app.command()
def routers() -> None:
    """List the routers, which say what experts see a token.

    They are options of `peft="routed[router=...]"` and of `effzoo.build(..., experts=8, router=...)`.

    Example:  effzoo routers
    """
    listed = table("router", "reads", "losses", "what it computes")
    for name in routing.names():
        cls = routing.get(name)
        losses = [option.name for option in routing.options(name) if option.name in LOSSES]
        listed.add_row(*map(Text, (name, cls.reads, ", ".join(losses) or "-", describe.first_sentence(cls))))
    say(listed, "\neffzoo show NAME tells more.")


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            help='A model, an attention kind, a method or a router, options allowed: "longformer\\[window=8]"; or a '
            "folder of a saved model."
        ),
    ],
    n: Annotated[int | None, typer.Option("--n", help="Positions in the picture of an attention pattern.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Draw the pattern as a decoder uses it.")] = False,
    save: Annotated[Path | None, typer.Option(help="Also write the picture to this PNG file.")] = None,
    file: File = None,
) -> None:
    """Show one entry: what it computes, its options, its paper, and for attention its pattern.

    A name that means several things (longformer is a model and an attention kind) shows all of them.

    Example:  effzoo show "longformer\\[window=8]" --n 32 --save pattern.png
    """
    if n is not None:
        whole("--n", n, least=1, most=4096)
    if save is not None and save.suffix.lower() != ".png":
        raise OptionError(f"--save writes a PNG file, got {save}; give a name that ends in .png")
    with loaded(file):
        if Path(name).is_dir():
            _show_folder(name)
            return
        _show(Spec(name) if name.endswith(".toml") else parse_one(name), n, causal, save)


def _show(spec: Spec, n: int | None, causal: bool, save: Path | None) -> None:
    known = {
        "model": _models(spec.name),
        "attention": _names(attention),
        "peft": _names(peft),
        "router": _names(routing),
    }
    kinds = [kind for kind, names in known.items() if spec.name in names and not (kind == "model" and spec.options)]
    if not kinds:
        if spec.name in known["model"]:
            raise OptionError(
                f"the model {spec.name!r} takes no options in its name; its sizes are keywords of effzoo.build"
            )
        raise UnknownNameError("name", spec.name, set().union(*known.values()))
    if save is not None and "attention" not in kinds:
        raise OptionError(
            f"--save draws attention patterns, and {spec.name!r} is no attention kind; those are "
            f"{', '.join(attention.names())}"
        )
    for position, kind in enumerate(kinds):
        if position:
            say("")
        if kind == "model":
            _show_model(spec)
        elif kind == "attention":
            _show_attention(spec, n, causal, save)
        elif kind == "peft":
            _show_peft(spec)
        else:
            _head(routing, spec, "a router", _router_traits(routing.get(spec.name)))


@app.command()
def account(
    model: Annotated[
        str, typer.Argument(help="A model of the zoo, a TOML file of your own, or a folder of a saved model.")
    ],
    peft: Peft = None,
    attention: Attention = None,
    num_labels: Annotated[
        int | None, typer.Option(help="With a classification head of so many labels, which every adapter trains.")
    ] = None,
    survey: Annotated[
        bool, typer.Option("--survey", help="Count the 22 methods of a published survey instead, beside its numbers.")
    ] = False,
    file: File = None,
) -> None:
    """Count what a method trains, stores and changes on a model, without loading any weights.

    Of a folder they are loaded, and its adapters counted.

    Example:  effzoo account longformer --peft "lora\\[rank=8]|prefix\\[length=16]"
    """
    if survey and peft is not None:
        raise OptionError("--survey counts methods of its own; leave --peft out")
    if num_labels is not None:
        whole("--num-labels", num_labels, least=1)
    with loaded(file):
        if survey:
            _survey(describe.on_meta(model, attention=attention))
            return
        head: dict[str, Any] = {} if num_labels is None else {"task": "classification", "num_labels": num_labels}
        built = describe.on_meta(model, attention=attention, peft=peft, **head)
        of = built.config.attention
        used = of if isinstance(of, str) else describe.kinds(of)
        say(
            heading(f"{built.config.name} with {used} attention, {peft or ', '.join(attached(built)) or 'no adapter'}"),
            str(account_of(built)),
        )


def _survey(model: Transformer) -> None:
    wide = console().width >= 110
    head = ["method", "trained", "at end", "survey", "changed", "survey", "tried on"]
    more = ["rank", "stored bytes", "FLOPs +%"] if wide else []
    listed = table(*head, *more, right=("trained", "at end", "changed", "stored bytes", "FLOPs +%"))
    refused, remarks = [], []
    for row in survey_of(model):
        of, published = row.account, row.published
        if of is None or row.flops is None or row.finished is None:
            refused.append(f"{published.name}: {row.refused}")
            continue
        cells = [
            published.spec, f"{of.percent:.3g}", "=" if row.finished == of.percent else f"{row.finished:.3g}",
            published.trained, "-" if of.changed is None else f"{100 * of.changed / of.total:.3g}",
            published.changed, "all" if len(published.sizes) == 3 else ", ".join(published.sizes),
        ]  # fmt: skip
        if wide:
            cells += ["-" if of.rank is None else str(of.rank), f"{of.stored_bytes:,}", f"{row.flops.extra:.2g}"]
        listed.add_row(*map(Text, cells))
        if published.spec in REMARKS:
            remarks.append(f"{published.spec}: {REMARKS[published.spec]}.")
    say(heading(f"{model.config.name}, {sum(p.numel() for p in model.parameters()):,} parameters"), listed)
    say(
        "\nsurvey: Lialin et al. 2023, arXiv:2303.15647v1, over many models; tried on: the sizes of models there. "
        "Shares in percent; trained: while it trains; at end: what is still trained when the stages are over (=: as "
        "much). changed: entries of the base after merging, - where nothing merges."
    )
    if wide:
        say(
            "rank: bound on the change of a matrix; stored: before training ends; FLOPs: at inference, merged where "
            "that is possible, 128 tokens."
        )
    say("", "Where the two are far apart:", *remarks)
    for refusal in refused:
        say(f"refused: {refusal}")


def _show_folder(folder: str) -> None:
    """A saved model, or a checkpoint of transformers."""
    model = load_folder(folder)
    names = [("labels", ", ".join(map(str, model.label_names)))] if model.label_names else []
    count = sum(parameter.numel() for parameter in model.parameters())
    rows = [("task", model.task), *names, *describe.config_rows(model.config, count)]
    say(heading(f"{folder}, a saved model"), pairs(rows), "", heading("account"), str(account_of(model)))


def _show_model(spec: Spec) -> None:
    say(heading(f"{spec.name}, a model"), pairs(describe.model_rows(spec.name)))


def _show_attention(spec: Spec, n: int | None, causal: bool, save: Path | None) -> None:
    cls, out = attention.get(spec.name), console()
    is_global = (0,) if cls.knows_globals() else ()
    n = _picture_size(spec) if n is None else n
    picture = plots.pattern_text(_spec(spec), n, is_global=is_global, causal=causal, width=48, colour=out.is_terminal)
    traits = [
        ("cost", cls.cost),
        ("attention matrix", f"{describe.dimensions(cls)} (of a head)"),
        ("projections", ", ".join(cls.projections)),
        ("causal", f"no: {cls.not_causal}" if cls.not_causal else "yes"),
        ("memory", f"{_yes(cls.takes_memory())} (prefix tuning)"),
        ("global tokens", _yes(cls.knows_globals())),
    ]
    _head(attention, spec, "an attention kind", traits)
    say("", Text.from_ansi(picture))
    if is_global:
        say("Position 0 is drawn as a global token.")
    if save is not None:
        replace_file(save, plots.png_bytes(plots.pattern_figure(_spec(spec), n, is_global=is_global, causal=causal)))
        say(f"wrote {save}")


def _show_peft(spec: Spec) -> None:
    cls, hung = peft.get(spec.name), describe.hung(spec)
    accepted = "any" if Site in cls.accepts else ", ".join(site.__name__ for site in cls.accepts)
    traits = [
        ("hangs on", f"{', '.join(cls.default_targets)} by default ({accepted} sites)"),
        *([] if hung is None else [("hooks", ", ".join(hung.hooks))]),
        ("at the start", "leaves the output unchanged" if peft.create(spec).identity_at_init else "changes the output"),
    ]
    if hung is not None:
        traits += [
            ("merges", "yes, into the weights" if hung.mergeable else "no, it is no change of a weight"),
            (
                "on BERT base",
                f"trains {hung.on_bert.trainable:,} of {hung.on_bert.total:,} parameters "
                f"({hung.on_bert.percent:.3g} %)",
            ),
        ]
    _head(peft, spec, "a fine-tuning method", traits)


def _router_traits(cls: type[Router]) -> list[tuple[str, str]]:
    alone = "from that token alone" if cls.alone else "from all tokens together, so not in a causal language model"
    return [
        ("reads", "the token" if cls.reads == "tokens" else "the number of the task"),
        ("in evaluation", f"a token's experts follow {alone}"),
    ]


def _head(view: View[Any], spec: Spec, what: str, traits: list[tuple[str, str]]) -> None:
    cls, aliases = view.get(spec.name), view.aliases(spec.name)
    say(heading(f"{cls.name}, {what}"), describe.summary(cls), "")
    say(pairs([*traits, *([("also called", ", ".join(aliases))] if aliases else []), ("paper", cls.paper or "-")]))
    options = describe.option_rows(view, spec.name)
    if options:
        listed = table("option", "type", "default", "meaning")
        for row in options:
            listed.add_row(*map(Text, row))
        say("", listed)


def _picture_size(spec: Spec) -> int:
    """Four times the largest whole-number option, so that a window of 512 is not everything there is; at least 32."""
    given = [spec.options.get(option.name, option.default) for option in attention.options(spec.name)]
    return min(2048, max([32, *(4 * value for value in given if isinstance(value, int))]))


def _spec(spec: Spec) -> Spec:
    """One layer is drawn: of options given one per layer, the first."""
    return Spec(
        spec.name,
        {key: value[0] if isinstance(value, tuple) and value else value for key, value in spec.options.items()},
    )


def _names(view: View[Any]) -> set[str]:
    return {name for first in view.names() for name in (first, *view.aliases(first))}


def _models(name: str) -> set[str]:
    return {*zoo.models(), *([name] if name.endswith(".toml") else [])}


def _short(paper: str) -> str:
    """Authors and year."""
    return paper.split(",")[0]


def _yes(value: bool) -> str:
    return "yes" if value else "no"
