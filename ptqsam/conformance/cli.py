"""The command line of the check of numbers (`tools/conformance.py`): run, compare, report; or change an expectation."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptqsam.cli import check_writable, exit_code_of, expand_folders
from ptqsam.conformance.expectations import ALL, Expectation, closest, load_suite, select
from ptqsam.conformance.metrics import FAILED, IMPROVEMENT, OK, REGRESSION, SKIPPED, Verdict, judge
from ptqsam.conformance.runs import Outcome, Runs, shell_line
from ptqsam.conformance.update import update_entry
from ptqsam.errors import AssetError, ConfigError
from ptqsam.progress import progress_bar
from ptqsam.report.summary import align

DEFAULT_WORDS = ['ci']
COLUMNS = ('entry', 'metric', 'expected', 'measured', 'verdict')


def main(tools: Path, argv: Sequence[str] | None = None) -> int:
    """Check the numbers of runs.

    Args:
        tools: folder of the project's other tools.
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 all are as expected (or skipped, without --strict), 1 some are not, 2 bad usage or file, 130
        interrupted.
    """
    args = parse_args(argv)
    return exit_code_of(
        lambda: run(args, tools), args.verbose, 'end other programs', 'interrupted; run again to go on where it stopped'
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='conformance.py',
        description='Run entries of a file of expectations and compare what they measure. An improvement fails, too: '
        'either something else is wrong, or the expectation has to be updated.',
    )
    parser.add_argument('words', nargs='*', metavar='NAME', help="entries or tags, 'all' for all; default ci")
    parser.add_argument('--file', type=Path, default=Path('exp/conformance.yaml'), help='default exp/conformance.yaml')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/conformance'), help='default work_dirs/conformance'
    )
    parser.add_argument('--list', action='store_true', help='show entries with their tags and commands, and stop')
    parser.add_argument('--strict', action='store_true', help='fail where an entry is skipped for want of its files')
    parser.add_argument('--update', nargs='+', metavar='NAME', help='run these and write what they measure to the file')
    parser.add_argument('--reason', help='why the new numbers are right; --update needs it')
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    args = parser.parse_args(argv)
    if bool(args.update) != bool((args.reason or '').strip()):
        parser.error('--update NAME and --reason TEXT go together: a number changes for a reason, which is kept')
    if args.update and args.words:
        parser.error('--update names the entries itself; leave out the others')
    return args


def run(args: argparse.Namespace, tools: Path) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.
        tools: folder of the project's other tools.

    Returns:
        Exit code 0 or 1.

    Raises:
        PTQSAMError: anything that the user can cause or cure, but for single entries.
    """
    expand_folders()
    entries = load_suite(args.file)
    for name in args.update or ():
        if name not in entries:
            raise ConfigError(f"--update: no entry '{name}' ({closest(name, list(entries))}); --list shows all")
    chosen = select(entries, args.update or args.words or ([ALL] if args.list else DEFAULT_WORDS))
    runs = Runs(tools, args.work_dir, chosen)
    if args.list:
        print(list_text(runs))
        print(json.dumps({name: list(entry.tags) for name, entry in chosen.items()}))
        return 0
    check_writable(args.work_dir, '--work-dir')
    verdicts = check(runs)
    if args.update:
        return update(args, runs, {name: verdicts[name] for name in args.update})
    print(table(runs, verdicts))
    words = {name: word_of(runs, name, verdicts[name]) for name in chosen}
    counts = Counter(words.values())
    print('\n' + ', '.join(f'{count} {word}' for word, count in counts.items()))
    if IMPROVEMENT in counts:
        print("an improvement that you can explain: --update NAME --reason '...'")
    print(json.dumps(summary(args, runs, verdicts, words)))
    return 0 if not set(counts) - {OK, *([] if args.strict else [SKIPPED])} else 1


def check(runs: Runs) -> dict[str, list[Verdict]]:
    """Run all entries, whatever becomes of them, and judge those that have a result."""
    verdicts = {}
    with progress_bar(len(runs.entries), 'conformance', 'entry') as bar:
        for name, entry in runs.entries.items():
            bar.set_postfix_str(name)
            done = runs.run(name)
            try:
                verdicts[name] = judge(entry.expect, runs.folder(name)) if done.word == OK else []
            except AssetError as error:  # something has been removed since
                runs.outcomes[name], verdicts[name] = Outcome(FAILED, str(error)), []
            bar.update()
    return verdicts


def word_of(runs: Runs, name: str, verdicts: list[Verdict]) -> str:
    """Verdict on an entry: the worst of those on its metrics."""
    if runs.outcomes[name].word != OK:
        return runs.outcomes[name].word
    words = {verdict.word for verdict in verdicts}
    return next(word for word in (FAILED, REGRESSION, IMPROVEMENT, OK) if word in words)


def update(args: argparse.Namespace, runs: Runs, verdicts: dict[str, list[Verdict]]) -> int:
    """Write what was measured into the file.

    Raises:
        ConfigError: an entry has no result, or lacks a metric; those before it are written.
    """
    changed = {}
    for name, metrics in verdicts.items():
        outcome = runs.outcomes[name]
        failures = [outcome.why] if outcome.word != OK else [v.why for v in metrics if v.word == FAILED]
        if failures:
            raise ConfigError(f'--update {name}: nothing to write ({failures[0]})')
        changed[name] = update_entry(args.file, name, {v.metric: v.measured for v in metrics}, args.reason.strip())
        for metric, (before, now) in changed[name].items():
            print(f'{name}: {metric}: {before} -> {now}')
        if not changed[name]:
            print(f'{name}: as it was')
    print(json.dumps(dict(file=str(args.file), reason=args.reason.strip(), updated=changed)))
    return 0


def table(runs: Runs, verdicts: dict[str, list[Verdict]]) -> str:
    """All metrics for people; an entry without a result has one line that says why."""
    rows = [COLUMNS]
    for name, metrics in verdicts.items():
        outcome = runs.outcomes[name]
        if outcome.word != OK:
            rows.append((name, '', '', '', f'{outcome.word}: {outcome.why}'))
        for verdict in metrics:
            word = f'{verdict.word}: {verdict.why}' if verdict.why else verdict.word
            rows.append((name, verdict.metric, expected_text(verdict.expected), number_text(verdict.measured), word))
    return align(rows)


def expected_text(expected: Expectation) -> str:
    """Value and tolerance, as `0.347 +- 0.01`."""
    return number_text(expected.value) + (f' +- {expected.tolerance:g}' if expected.tolerance else '')


def number_text(value: Any) -> str:
    """A measured value with the digits that matter."""
    if isinstance(value, tuple):
        return ', '.join(value) or 'none'
    return f'{value:.5g}' if isinstance(value, float) else '-' if value is None else str(value)


def list_text(runs: Runs) -> str:
    """Entries with tags and the command that they run."""
    rows = [('entry', 'tags', 'command')]
    for name, entry in runs.entries.items():
        rows.append((name, ', '.join(entry.tags), shell_line(runs.command(name))))
    return align(rows)


def summary(
    args: argparse.Namespace, runs: Runs, verdicts: dict[str, list[Verdict]], words: dict[str, str]
) -> dict[str, Any]:
    """The check for machines."""

    def entry(name: str) -> dict[str, Any]:
        outcome = runs.outcomes[name]
        metrics = {
            v.metric: dict(
                expected=v.expected.value, tolerance=v.expected.tolerance, measured=v.measured, verdict=v.word
            )
            for v in verdicts[name]
        }
        why = outcome.why or next((v.why for v in verdicts[name] if v.why), '')
        return dict(verdict=words[name], why=why, seconds=outcome.seconds, reused=outcome.reused, metrics=metrics)

    return dict(file=str(args.file), work_dir=str(args.work_dir), entries={name: entry(name) for name in words})
