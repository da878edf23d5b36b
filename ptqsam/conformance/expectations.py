"""The file of expectations: which runs, and which of their numbers have to stay, within what."""

import datetime
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, model_validator

from ptqsam.config.base import Schema
from ptqsam.config.files import check_schema
from ptqsam.errors import ConfigError
from ptqsam.yaml_files import StrictLoader

# chooses all entries on the command line
ALL = 'all'
# names that an error lists
SHOWN = 10
# a number, a text, texts
Value = float | str | Annotated[tuple[str, ...], Field(strict=False)]


class Expectation(Schema):
    """What a metric has to be.

    Attributes:
        value: a number, or what has to be equal (a text, a list of texts).
        tolerance: how far from a number is still as expected.
    """

    value: Value
    tolerance: float = Field(default=0.0, ge=0)

    @model_validator(mode='after')
    def tolerance_is_that_of_a_number(self) -> Self:
        """Refuse a tolerance where nothing can be near."""
        if self.tolerance and not isinstance(self.value, float):
            raise ValueError('only a number has a tolerance')
        return self


class Scenes(Schema):
    """Composed scenes, which are made where they are needed, in the place of `PTQSAM_DATA`.

    Attributes:
        train: images to calibrate on.
        val: images to evaluate on.
    """

    train: int = Field(ge=1)
    val: int = Field(ge=1)


class Setup(Schema):
    """What an entry may share with others; the options of `tools/test_quant.py`.

    Attributes:
        config: pipeline.
        recipe: recipe; of an entry with `load`, that of the entry it names.
        cfg_options: of the pipeline.
        quant_options: of the recipe.
        limit: evaluated images, None: all.
        seed: of calibration, None: that of the recipe.
        eval_fp: evaluate the float model, too.
        scenes: run on scenes made for it.
        tags: names of groups of entries.
    """

    config: str | None = None
    recipe: str | None = None
    cfg_options: dict[str, Any] = {}
    quant_options: dict[str, Any] = {}
    limit: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=0)
    eval_fp: bool = False
    scenes: Scenes | None = None
    tags: tuple[str, ...] = Field(default=(), strict=False)


class Change(Schema):
    """An expectation that was changed, and why.

    Attributes:
        date: when.
        reason: why the new numbers are right.
        was: metric -> value before.
    """

    date: datetime.date
    reason: str = Field(min_length=1)
    was: dict[str, Value]


class Entry(Setup):
    """A run and what has to come out.

    Attributes:
        setup: name of the setup that gives what is left out here.
        load: name of the entry whose packed checkpoint is evaluated, in place of quantizing.
        expect: metric -> expectation (`ptqsam.conformance.metrics` says which names there are).
        history: changes of the expectations, oldest first.
    """

    setup: str | None = None
    load: str | None = None
    expect: dict[str, Expectation]
    history: tuple[Change, ...] = Field(default=(), strict=False)

    @model_validator(mode='after')
    def something_is_expected(self) -> Self:
        """Refuse an entry that cannot fail."""
        if not self.expect:
            raise ValueError("'expect' is empty; name a metric and its value")
        return self


class Suite(Schema):
    """Content of the file.

    Attributes:
        setups: name -> what entries share.
        entries: name -> run and expectations.
    """

    setups: dict[str, Setup] = {}
    entries: dict[str, Entry]


def load_suite(path: Path) -> dict[str, Entry]:
    """Read and check a file of expectations.

    Args:
        path: YAML file.

    Returns:
        Name -> entry, in the order of the file, complete: with what its setup and the entry that it loads give.

    Raises:
        ConfigError: no such file, not YAML, a key that is unknown or given twice, a name that leads nowhere.
    """
    try:
        return parse_suite(path.read_text(encoding='utf-8'), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f'{path}: cannot be read ({reason}); see exp/conformance.yaml') from None


def parse_suite(text: str, where: str) -> dict[str, Entry]:
    """`load_suite` of the text of a file; `where` names it in errors."""
    try:
        content = yaml.load(text, Loader=StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f'{where}: not valid YAML ({" ".join(str(error).split())})') from None
    if not isinstance(content, dict):
        raise ConfigError(f'{where}: not a mapping with the key entries; see exp/conformance.yaml')
    suite = check_schema(Suite, content, where)
    whole = {name: _with_setup(name, entry, suite, where) for name, entry in suite.entries.items()}
    return {name: _with_loaded(name, entry, whole, where) for name, entry in whole.items()}


def select(entries: dict[str, Entry], words: Sequence[str]) -> dict[str, Entry]:
    """Choose entries, and what they load.

    Args:
        entries: of the file.
        words: names and tags; 'all'.

    Returns:
        Chosen entries in the order of the file, each behind the one that it loads.

    Raises:
        ConfigError: an unknown word.
    """
    tags = {tag for entry in entries.values() for tag in entry.tags}
    chosen: set[str] = set()
    for word in words:
        found = {name for name, entry in entries.items() if word in (name, ALL, *entry.tags)}
        if not found:
            raise ConfigError(f"no entry or tag '{word}' ({closest(word, [*entries, *tags, ALL])}); --list shows all")
        chosen |= found
    chosen |= {load for name in chosen if (load := entries[name].load)}
    places = list(entries)

    def place(name: str) -> tuple[int, bool, int]:
        load = entries[name].load
        return places.index(load or name), load is not None, places.index(name)

    return {name: entries[name] for name in sorted(chosen, key=place)}


def closest(word: str, known: Sequence[str]) -> str:
    """Words that propose the known name that was meant."""
    if close := difflib.get_close_matches(word, known, n=1):
        return f"did you mean '{close[0]}'?"
    listed = ', '.join(sorted(known)[:SHOWN]) or 'none'
    return f'known: {listed}{", ..." * (len(known) > SHOWN)}'


def _with_setup(name: str, entry: Entry, suite: Suite, where: str) -> Entry:
    """An entry with what its setup gives; options and tags of both are joined, those of the entry win."""
    if not re.fullmatch(r'\w[\w.-]*', name):
        raise ConfigError(f"{where}: '{name}' names a folder as well; use letters, digits, '_', '-' and '.'")
    if name == ALL or any(name in other.tags for other in (*suite.entries.values(), *suite.setups.values())):
        raise ConfigError(f"{where}: '{name}' is the name of an entry and a tag; rename one of them")
    if entry.setup is None:
        return entry
    if entry.setup not in suite.setups:
        raise ConfigError(f"{where}: {name}: no setup '{entry.setup}' ({closest(entry.setup, list(suite.setups))})")
    shared = suite.setups[entry.setup]
    given = {key: getattr(shared, key) for key in shared.model_fields_set - entry.model_fields_set}
    joined = {key: getattr(shared, key) | getattr(entry, key) for key in ('cfg_options', 'quant_options')}
    return entry.model_copy(update=given | joined | dict(tags=shared.tags + entry.tags))


def _with_loaded(name: str, entry: Entry, entries: dict[str, Entry], where: str) -> Entry:
    """An entry with what the one whose checkpoint it evaluates gives; it has to be what the tool was run with."""
    if entry.config is None:
        raise ConfigError(f'{where}: {name}: config is missing; name a pipeline there or in its setup')
    if entry.load is None:
        if entry.recipe is None:
            raise ConfigError(f'{where}: {name}: recipe is missing; name one, or with load the entry to evaluate')
        return entry
    if entry.load not in entries:
        raise ConfigError(f"{where}: {name}: load: no entry '{entry.load}' ({closest(entry.load, list(entries))})")
    loaded = entries[entry.load]
    if loaded.load is not None:
        raise ConfigError(f"{where}: {name}: load: '{entry.load}' quantizes nothing itself; name '{loaded.load}'")
    quantized = ('recipe', 'quant_options', 'seed')
    if own := [key for key in quantized if getattr(entry, key) not in (None, {})]:
        raise ConfigError(f"{where}: {name}: {' and '.join(own)} would be those of '{entry.load}'; leave them out")
    return entry.model_copy(update={key: getattr(loaded, key) for key in quantized})
