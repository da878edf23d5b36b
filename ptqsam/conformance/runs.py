"""Running an entry: `tools/test_quant.py` in a process of its own, in a folder of its own, never twice for the same."""

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mmengine.device import get_device

import ptqsam
from ptqsam.check_assets import asset_rows
from ptqsam.check_setup import package_rows
from ptqsam.cli import load_model_config
from ptqsam.config import load_quant_config
from ptqsam.conformance.expectations import Entry, Scenes
from ptqsam.conformance.metrics import FAILED, OK, SKIPPED
from ptqsam.errors import AssetError, ConfigError, PTQSAMError
from ptqsam.fileio import fingerprint, folder_lock, write_json
from ptqsam.sweep.cells import file_hash, named_files
from ptqsam.tool_process import INTERRUPTED, reason, run_tool

# the numbers of README.md and docs/ are those of one thread, and at low bits they depend on it
THREADS = 1
# in the folder of an entry: what its result depends on, and whether it is complete
STATE = 'conformance.json'
PACKAGE = Path(ptqsam.__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """What became of the run of an entry.

    Attributes:
        word: ok (it has a result), failed or skipped.
        why: one line, of one that has none.
        seconds: that the run took.
        reused: whether an earlier check made the result.
    """

    word: str
    why: str = ''
    seconds: float = 0.0
    reused: bool = False


@dataclass
class Runs:
    """Runs of the entries of a file.

    Args:
        tools: folder of `test_quant.py` and `make_scenes.py`.
        work_dir: each entry has a folder in it.
        entries: name -> entry, those that are loaded before those that load them.

    Attributes:
        outcomes: name -> what became of it, so far.
    """

    tools: Path
    work_dir: Path
    entries: dict[str, Entry]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, name: str) -> Outcome:
        """Run an entry, unless its result is there or cannot be; a failure of the run is an outcome, too."""
        try:
            with self._data(self.entries[name].scenes):
                outcome = self._run(name)
        except PTQSAMError as error:
            outcome = Outcome(FAILED, str(error))
        except OSError as error:
            outcome = Outcome(FAILED, f'{error.filename or self.folder(name)}: {error.strerror}')
        self.outcomes[name] = outcome
        return outcome

    def folder(self, name: str) -> Path:
        """Work dir of an entry."""
        return self.work_dir / name

    def command(self, name: str) -> list[str]:
        """Command line of an entry, as a user types it."""
        entry = self.entries[name]
        words = [str(self.tools / 'test_quant.py'), entry.config, entry.recipe, '--work-dir', str(self.folder(name))]
        for option, value in (('--limit', entry.limit), ('--seed', entry.seed)):
            words += [option, str(value)] if value is not None else []
        words += ['--eval-fp'] if entry.eval_fp else []
        words += ['--load', str(self.folder(entry.load) / 'packed')] if entry.load else []
        for option, values in (('--quant-options', entry.quant_options), ('--cfg-options', entry.cfg_options)):
            words += [option, *option_words(values)] if values else []
        return ['python', *map(str, words)]

    def _run(self, name: str) -> Outcome:
        entry, folder = self.entries[name], self.folder(name)
        if entry.load and (loaded := self.outcomes[entry.load]).word != OK:
            return Outcome(loaded.word, f'{entry.load}, which it loads: {loaded.why}')
        if absent := missing_assets(entry):
            return Outcome(SKIPPED, absent)
        key = self._key(name)
        make_own(folder)
        with folder_lock(folder, 'check'):
            state = read_state(folder)
            if state == dict(state, key=key, finished=True):
                return Outcome(OK, seconds=state['seconds'], reused=True)
            if state.get('key') != key:
                clear(folder)
            start = time.monotonic()
            write_json(folder / STATE, dict(key=key, finished=False))
            self._call(self.command(name)[1:] + ['--resume'] * (entry.load is None), folder / 'console.txt')
            seconds = round(time.monotonic() - start, 1)
            write_json(folder / STATE, dict(key=key, finished=True, seconds=seconds))
        return Outcome(OK, seconds=seconds)

    def _key(self, name: str) -> str:
        """Name of all that the result of an entry depends on."""
        entry = self.entries[name]
        config = load_model_config(str(entry.config), entry.cfg_options)
        return fingerprint(
            dict(
                config=config.to_dict(),
                files=[file_hash(path) for path in named_files(config)],
                recipe=load_quant_config(str(entry.recipe), entry.quant_options).plain(),
                options=[entry.limit, entry.seed, entry.eval_fp, str(entry.scenes)],
                loaded=self._key(entry.load) if entry.load else None,
                setting=setting(),
            )
        )

    @contextmanager
    def _data(self, scenes: Scenes | None) -> Iterator[None]:
        """Let `PTQSAM_DATA` be the folder of scenes, made first, where an entry has them."""
        if scenes is None:
            yield
            return
        # what another version of the code has made is not touched
        made_by = fingerprint(setting()['code'])
        root = self.work_dir / f'scenes_{scenes.train}_{scenes.val}_{made_by}' / 'scenes'
        words = [self.tools / 'make_scenes.py', '--root', root, '--num-train', scenes.train, '--num-val', scenes.val]
        if not root.is_dir():  # it is complete or absent
            root.parent.mkdir(parents=True, exist_ok=True)
            self._call([*map(str, words)], root.parent / 'console.txt')
        before = os.environ.get('PTQSAM_DATA')
        os.environ['PTQSAM_DATA'] = str(root.parent)
        try:
            yield
        finally:
            if before is None:
                del os.environ['PTQSAM_DATA']
            else:
                os.environ['PTQSAM_DATA'] = before

    def _call(self, words: list[str], console: Path) -> None:
        """Run a tool of this project, with the code that is imported here.

        Raises:
            AssetError: it fails, with its last words.
        """
        path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get('PYTHONPATH'))))
        with console.open('wb') as file:
            own = dict(PYTHONPATH=path, MPLBACKEND='Agg')
            code = run_tool([sys.executable, *words], file.fileno(), THREADS, own)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise AssetError(f'{reason(console, 0, code).removeprefix("error: ")} (see {console})')


def option_words(options: dict[str, Any]) -> list[str]:
    """Options as `key=value`, as mmengine's parser of the command line reads them."""
    return [f'{key}={str(value).replace(" ", "")}' for key, value in options.items()]


def shell_line(command: list[str]) -> str:
    """A command as a user types it, with paths from where he is."""
    here = f'{Path.cwd()}{os.sep}'
    return shlex.join(word.removeprefix(here) for word in command)


def missing_assets(entry: Entry) -> str:
    """Which checkpoint or data of an entry is not there and where it was looked for; '' if all are."""
    rows = asset_rows(
        argparse.Namespace(
            model_config=entry.config,
            quant_config=entry.recipe,
            limit=entry.limit,
            cfg_options=option_words(entry.cfg_options),
            quant_options=option_words(entry.quant_options),
        )
    )
    return ', '.join(f'no {row.what}: {row.found}' for row in rows if row.state == 'missing')


@cache
def setting() -> dict[str, Any]:
    """What all entries depend on: the code, the packages below it, the device."""
    code = {
        str(path.relative_to(PACKAGE.parent)): fingerprint(path.read_text(encoding='utf-8'))
        for folder in ('ptqsam', 'projects')
        for path in sorted((PACKAGE.parent / folder).rglob('*.py'))
    }
    return dict(code=code, packages=[str(row) for row in package_rows()], device=get_device(), threads=THREADS)


def make_own(folder: Path) -> None:
    """Make the folder of an entry.

    Raises:
        ConfigError: something that no check has made lies there.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).is_file():
        raise ConfigError(f'{folder}: holds files that no check has made; choose another --work-dir')
    folder.mkdir(parents=True, exist_ok=True)


def clear(folder: Path) -> None:
    """Remove what a check of something else has left; last the file that says that a check has made the folder."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def read_state(folder: Path) -> dict[str, Any]:
    """What the last check wrote of itself; nothing if it did not come that far."""
    try:
        state = json.loads((folder / STATE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}
