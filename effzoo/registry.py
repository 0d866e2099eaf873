"""One table, (kind, name) -> class, seen through a typed view per kind: `attention`, `peft` and `router`.

The options of an entry are the keyword-only parameters of its constructor: nothing else has to be declared.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import sys
import traceback
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from effzoo.annotations import describe, in_type, plain, problem, unreadable, unwritable
from effzoo.errors import ArgumentError, EffzooError, OptionError, UnknownNameError, did_you_mean, listing, shown
from effzoo.memory import room
from effzoo.spec import Spec, parse_one

T = TypeVar("T")
_table: dict[tuple[str, str], Any] = {}
_declared: weakref.WeakKeyDictionary[type, list[Option]] = weakref.WeakKeyDictionary()  # reading annotations takes long
_OWN = {"attention": "effzoo.attention", "peft": "effzoo.peft", "router": "effzoo.routing"}  # imported on first use
_entry_points_loaded = False
ENTRY_POINT_GROUP = "effzoo.plugins"


@dataclass(frozen=True)
class Option:
    """One option of an entry: its name, its annotation as written, and its default."""

    name: str
    annotation: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


class View(Generic[T]):
    """The entries of one kind."""

    def __init__(self, kind: str):
        self.kind = kind

    def register(self, *names: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class under its name, and any aliases after it.

        A class of the same module and name takes the place of the entry, as when a cell of a notebook or a file runs
        again. Raises OptionError for a name that a class of another origin has.
        """
        for name in names:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise OptionError(f"a registry name holds letters, digits, '_' and '-', got {name!r}")

        def enter(cls: type[T]) -> type[T]:
            for name in names:
                entered = _table.get((self.kind, name))
                if entered is not None and _origin(entered) != _origin(cls):
                    raise OptionError(
                        f"{self.kind} {name!r} is already registered by {entered.__qualname__}; choose another name"
                    )
            _require_keyword_only(self.kind, names[0], cls)
            if not cls.__module__.startswith("effzoo."):  # those are read in a test: reading annotations takes long
                # of a name that the module may have later; said when the options are asked for
                with suppress(NameError):
                    check_declared(self.kind, names[0], cls)
            cls.name = names[0]  # type: ignore[attr-defined]
            _check_when_made(self.kind, cls)
            for name in names:
                _table[self.kind, name] = cls
            return cls

        return enter

    def names(self) -> list[str]:
        """Every entry once, by its first name."""
        _load_entries(self.kind)
        return sorted({cls.name for (kind, _), cls in _table.items() if kind == self.kind})

    def aliases(self, name: str) -> list[str]:
        """The other names of an entry."""
        cls: Any = self.get(name)
        return sorted(
            alias for (kind, alias), c in _table.items() if kind == self.kind and c is cls and alias != cls.name
        )

    def get(self, name: str) -> type[T]:
        """The class of an entry; UnknownNameError lists the known names and the closest."""
        if (self.kind, name) not in _table:
            _load_entries(self.kind)
        try:
            return _table[self.kind, name]
        except KeyError:
            known = [known for kind, known in _table if kind == self.kind]
            raise UnknownNameError(f"{self.kind} method" if self.kind == "peft" else self.kind, name, known) from None

    def options(self, name: str) -> list[Option]:
        """The keyword-only parameters of the entry's constructor."""
        return list(_options(self.get(name)))

    def create(self, given: str | Mapping[str, Any] | Spec, *arguments: Any) -> T:
        """Build one entry from a spec.

        Raises OptionError for unknown options, and for values of another type or outside their range.
        """
        spec = parse_one(given)
        cls = self.get(spec.name)
        _check_names(self.kind, spec, _options(cls))
        try:
            inspect.signature(cls).bind(*arguments, **spec.options)
        except TypeError as error:
            raise ArgumentError(
                f"{self.kind} {spec.name!r} cannot be made of {len(arguments)} arguments beside its options: {error}"
            ) from None
        return cls(*arguments, **spec.options)


attention: View[Any] = View("attention")
peft: View[Any] = View("peft")
router: View[Any] = View("router")


def load_file(path: str | Path) -> list[tuple[str, str]]:
    """Run a Python file and return the (kind, name) pairs that it registered.

    Run again, it takes the place of what it registered before. Raises OptionError for a file that is not there or
    fails; the registry is then as it was.
    """
    path = Path(path)
    if not os.path.isfile(path):
        raise OptionError(f"no such file: {shown(str(path))}; give a Python file that registers kinds or methods")
    before = _whole_table()
    name = f"effzoo_file_{path.stem}_{zlib.crc32(str(path.absolute()).encode()):08x}"  # two files may have one name
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{path} is not a Python file; give one that ends in .py")
    # where dataclasses and torch.compile look for it
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        # not by the loader, whose compiled copy is older than a file that was written twice within a second
        exec(compile(path.read_bytes(), str(path.absolute()), "exec"), module.__dict__)
    except EffzooError:
        _forget(name, before)
        raise
    except (Exception, SystemExit) as error:
        _forget(name, before)
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename) == path.absolute()
        ]
        where = f" at line {lines[-1]}" if lines else ""
        raise OptionError(f"{path} failed{where} while it was imported: {type(error).__name__}: {error}") from error
    changed = [entry for entry, cls in _table.items() if before.get(entry) is not cls]
    return sorted(entry for entry in changed if not _table[entry].__module__.startswith("effzoo."))


def _origin(cls: type) -> tuple[str, str]:
    """Where a class is written: its module, and its name there."""
    return cls.__module__, cls.__qualname__


def _forget(module: str, table: Mapping[tuple[str, str], Any]) -> None:
    """Undo what a file has done that failed."""
    del sys.modules[module]
    _table.clear()
    _table.update(table)


@contextmanager
def scope() -> Iterator[None]:
    """Entries registered inside the `with` block are gone after it."""
    before = _whole_table()
    try:
        yield
    finally:
        _table.clear()
        _table.update(before)


def _whole_table() -> dict[tuple[str, str], Any]:
    """All entries, after those of every kind are imported: what is put back later holds the zoo's own too."""
    for kind in _OWN:
        _load_entries(kind)
    return dict(_table)


def _load_entries(kind: str) -> None:
    """Import the entries of this kind, and those of plug-ins."""
    global _entry_points_loaded
    importlib.import_module(_OWN[kind])
    if _entry_points_loaded:
        return
    _entry_points_loaded = True
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception:  # one broken plug-in must not take the zoo down; it is reported, not hidden
            logging.getLogger("effzoo").exception("plug-in %r (%s) failed to load", point.name, point.value)


def _constructor(cls: type) -> Callable[..., None]:
    return cls.__init__  # type: ignore[misc]


def _options(cls: type) -> list[Option]:
    try:
        return _read_options(cls)
    except NameError as error:
        raise OptionError(
            f"an annotation in the constructor of {cls.__qualname__} names {error.name!r}, which its module does not "
            "have; import it there, "
            "or annotate the option with a type such as int, float or str"
        ) from None


def _read_options(cls: type) -> list[Option]:
    """NameError for an annotation that names what its module does not have, or not yet."""
    if cls not in _declared:
        try:
            signature = inspect.signature(_constructor(cls), eval_str=True)
        except NameError:
            raise
        except Exception as error:  # an annotation may be any expression
            raise OptionError(
                f"an annotation in the constructor of {cls.__qualname__} cannot be read ({type(error).__name__}: "
                f"{error}); annotate the option "
                "with a type such as int, float or str"
            ) from None
        _declared[cls] = [
            Option(p.name, p.annotation, p.default) for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY
        ]
    return _declared[cls]


def _require_keyword_only(kind: str, name: str, cls: type) -> None:
    for parameter in (
        inspect.signature(_constructor(cls)).parameters.values() if _constructor(cls) is not object.__init__ else ()
    ):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            stars = 2 if parameter.kind is parameter.VAR_KEYWORD else 1
            raise OptionError(
                f"{kind} {name!r}: the constructor of {cls.__qualname__} takes {'*' * stars}{parameter.name}, which "
                "hides its options; "
                "write each option as a keyword-only parameter with a default"
            )


def check_declared(kind: str, name: str, cls: type) -> None:
    """Refuse an option whose annotation says what no spec or adapter file can hold."""
    for option in _read_options(cls):
        odd = unreadable(option.annotation)
        if odd is not None:
            raise OptionError(
                f"{kind} {name!r}: option {option.name!r} is annotated {inspect.formatannotation(odd)}, which specs "
                "and adapter files cannot hold; "
                "annotate bool, int, float, str, None, a Literal of these, a list, tuple, Sequence, dict or Mapping, "
                "or a union of such, and make "
                "other things of them in the constructor"
            )


def _check_when_made(kind: str, cls: type) -> None:
    """Let the constructor check the values of its options, whether they come from a spec, a mapping or a call."""
    made = _constructor(cls)
    if made is object.__init__ or hasattr(made, "checks_options"):
        return

    @functools.wraps(made)
    def checked(self: Any, *arguments: Any, **options: Any) -> None:
        declared = {option.name: option for option in _options(cls) if option.name in options}
        for key, option in declared.items():
            options[key] = plain(options[key])
            wrong = problem(options[key], option.annotation)
            if wrong is not None:
                typed = wrong.startswith("takes")
                raise OptionError(
                    f"option {key!r} of {kind} {self.name!r} {wrong}" if typed else f"{self.name}: {key} {wrong}"
                )
            odd = unwritable(options[key])
            if odd is not None:
                raise OptionError(
                    f"option {key!r} of {kind} {self.name!r} holds {odd}, which no spec and no adapter file can "
                    "hold; give finite numbers, texts, "
                    "true or false, none, and lists of them and maps from text to them"
                )
            options[key] = in_type(options[key], option.annotation)
        with room(options):
            made(self, *arguments, **options)

    checked.checks_options = True  # type: ignore[attr-defined]
    cls.__init__ = checked  # type: ignore[misc]


def _check_names(kind: str, spec: Spec, options: Sequence[Option]) -> None:
    known = {option.name: option for option in options}
    for key in spec.options:
        if key not in known:
            hint = (
                " Several kinds of attention are a list with one spec for each layer."
                if (kind, key) == ("attention", "layers")
                else ""
            )
            raise OptionError(
                f"{kind} {spec.name!r} has no option {shown(key)}{did_you_mean(key, known)} Options: "
                f"{listing(known)}.{hint}"
            )
    for option in options:
        if option.required and option.name not in spec.options:
            raise OptionError(f"{kind} {spec.name!r} needs the option {option.name!r} ({describe(option.annotation)})")
