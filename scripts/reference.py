"""The reference pages of the documentation: an entry for every public name, made from the `__all__` of each package."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

PACKAGES = {  # in the order in which the pages stand, with what each is for
    "effzoo": "What most scripts need: build, attach, train, save, measure.",
    "effzoo.attention": "Attention kinds, their contract, and the softmax under them.",
    "effzoo.peft": "Adapters on a model, and the contract of methods.",
    "effzoo.peft.parameter": "Methods that change what a site's weight or bias is: f(theta + phi).",
    "effzoo.peft.input": "Methods that put rows, keys or values beside the input: f([phi, x]).",
    "effzoo.peft.function": "Methods that transform what a site receives or returns: phi(f(x)).",
    "effzoo.peft.combined": "Combinations that papers propose under a name of their own.",
    "effzoo.peft.modular": "Mixtures: several modules at a site, and what chooses among them.",
    "effzoo.routing": "Routers: which experts see a token.",
    "effzoo.sites": "Where fine-tuning modules hang, and what they may do there.",
    "effzoo.data": "Texts and labels from files, split and tokenised.",
    "effzoo.train": "Training, prediction, distillation.",
    "effzoo.parallel": "One sequence over several ranks.",
    "effzoo.convert": "Weights and configurations to and from transformers.",
    "effzoo.transformers": "A model of effzoo as a model of transformers, and its folders in AutoModel.",
    "effzoo.export": "Graphs that run without effzoo: torch.export, ONNX.",
    "effzoo.convert.peft_files": "Adapters in the files of the peft package.",
    "effzoo.plans": "Memory of a training step, predicted.",
    "effzoo.quantisation": "A frozen base in 8 or 4 bits.",
    "effzoo.checks": "The contracts of kinds and methods, as checks that run.",
    "effzoo.course": "Assignments that grade themselves, and what one of your own is made of.",
    "effzoo.architectures": "Whole models and their configurations.",
    "effzoo.blocks": "What every architecture is built from.",
    "effzoo.measure": "Time, memory and saved activations, measured.",
    "effzoo.lab": "Experiments of five lectures, and the frame they run in.",
    "effzoo.tasks": "Tasks that are generated, not downloaded.",
}
VIEW = "effzoo.registry.View"


def pages() -> dict[str, str]:
    """The text of every page, by the name of its file."""
    written: dict[str, str] = {}
    made = {"index.md": index(), **{f"{package}.md": page(package, written) for package in PACKAGES}}
    made[f"{VIEW}.md"] = (
        f"# Registry views\n\n`names`, `get`, `options`, ... of a package are the methods of its view.\n\n::: {VIEW}\n"
    )
    return made


def index() -> str:
    """The list of pages."""
    lines = [
        "# Reference",
        "",
        "Every public name, by the package that it is imported from.",
        "",
        "| package | names |",
        "|---|---|",
    ]
    for package, what in PACKAGES.items():
        names = ", ".join(
            f"[`{name}`]({package}.md#{package}.{name})" for name in public(importlib.import_module(package))
        )
        lines.append(f"| [`{package}`]({package}.md) | {what} {names} |")
    return "\n".join([*lines, ""])


def public(module: ModuleType) -> list[str]:
    """The names in `__all__`."""
    return list(module.__all__)


def page(package: str, written: dict[str, str]) -> str:
    """One package. written: where each object has its entry already, by its path in the source; added to."""
    module = importlib.import_module(package)
    lines = [f"# {package}", "", "\n\n".join(paragraph for paragraph in inspect.getdoc(module).split("\n\n")[:1]), ""]
    entries: list[str] = []
    packages: list[str] = []
    elsewhere: dict[str, list[str]] = {}  # names that have their entry on another page
    for name in public(module):
        path = where(package, name)
        anchor = f"[](){{ #{package}.{name} }}"
        if isinstance(getattr(module, name), ModuleType):
            if path in PACKAGES:
                packages.append(f"- {anchor}[`{name}`]({path}.md): {PACKAGES[path]}")
            else:
                entries += file_of(path, name, anchor, written, package)
        elif path in written:
            elsewhere.setdefault(f"also in `{written[path].removesuffix('.md')}`", []).append(
                f"{anchor}[`{name}`]({written[path]}#{path})"
            )
        elif path.startswith(f"{VIEW}."):
            elsewhere.setdefault("of the registry", []).append(f"{anchor}[`{name}`]({VIEW}.md#{path})")
        else:
            written[path] = f"{package}.md"
            entries += [
                anchor,
                "",
                f"::: {path}",
                "    options:",
                f'      heading: "{name}"',
                f'      toc_label: "{name}"',
                "",
            ]
    listed = [*packages, *(f"- {what}: {', '.join(names)}" for what, names in elsewhere.items())]
    return "\n".join([*lines, *([*listed, ""] if listed else []), *entries])


def file_of(path: str, name: str, anchor: str, written: dict[str, str], package: str) -> list[str]:
    """A module of kinds, methods or routers: the classes that it registers."""
    module = importlib.import_module(path)
    kinds = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__module__ == path and "name" in vars(value)
    ]
    lines = [anchor, "", f"## {name}", "", inspect.getdoc(module) or "", ""]
    for kind in kinds:
        here = f"{path}.{kind.__qualname__}"
        written[here] = f"{package}.md"
        heading = f"{kind.name}: {kind.__qualname__}"
        lines += [
            f"::: {here}",
            "    options:",
            f'      heading: "{heading}"',
            f'      toc_label: "{kind.name}"',
            "      heading_level: 3",
        ]
        lines += ["      members: false", ""]
    return lines


def where(package: str, name: str) -> str:
    """The path at which the source defines a public name."""
    module = importlib.import_module(package)
    value = inspect.unwrap(getattr(module, name))
    if isinstance(value, ModuleType):
        return value.__name__
    if inspect.ismethod(value):
        return f"{VIEW}.{value.__name__}"
    if callable(value):
        return f"{value.__module__}.{value.__qualname__}"
    # a constant says nothing of where it is from
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
            return f"{node.module}.{name}"
    return f"{package}.{name}"
