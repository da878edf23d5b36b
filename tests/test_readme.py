"""README.md is a program: its commands must exist, take the options shown, and name files that are there.

A ```` ```bash ```` block directly below the comment ``<!-- test: run -->`` is executed as well, and the config and the
recipe that it shows are built.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from ptqsam.cli import load_model_config, parse_args
from ptqsam.config import load_quant_config
from ptqsam.modules.walk import quantizers
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.reconstruct import check_reconstruction
from ptqsam.solver.rules import RuleBook
from tests.tiny import ROOT

RUN_MARK = '<!-- test: run -->'
RUN_LIMIT_SECONDS = 300
# the console entry of setup.py, and the tool that does the same
ENTRY, ENTRY_TOOL = 'ptqsam-test', 'tools/test_quant.py'


@dataclass
class Block:
    """One ```` ```bash ```` block: where it begins, whether it is to be run, its text, and each command's words."""

    line: int
    run: bool
    source: str = ''
    commands: list[list[str]] = field(default_factory=list)


def parse_blocks(text: str) -> list[Block]:
    """The bash blocks of a Markdown text."""
    blocks: list[Block] = []
    block, above = None, ''
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if block is None:
            if stripped == '```bash':
                block = Block(number, run=above == RUN_MARK)
                blocks.append(block)
            above = stripped or above
        elif stripped == '```':
            block.commands = [words for command in block.source.splitlines() for words in split_commands(command)]
            block, above = None, ''
        else:
            # a backslash at its end joins a line to the next one
            block.source += stripped[:-1] + ' ' if stripped.endswith('\\') else stripped + '\n'
    assert block is None, f'line {blocks[-1].line}: the block is not closed'
    return blocks


def split_commands(line: str) -> list[list[str]]:
    """The words of each command of a shell line, without comments, operators and leading variables."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=';&|')
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(';&|'):
            commands.append([])
        elif commands[-1] or not re.fullmatch(r'\w+=.*', word):
            commands[-1].append(word)
    return [words for words in commands if words]


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r'^([a-z][\w-]*):(?!=)', makefile, re.MULTILINE))


def tool_call(words: list[str]) -> tuple[str, list[str]] | None:
    """The tool that a command runs and its arguments, or None if it runs no tool of ours."""
    for position, word in enumerate(words):
        if word == ENTRY:
            return ENTRY_TOOL, words[position + 1 :]
        if word.startswith('tools/') and word.endswith('.py'):
            return word, words[position + 1 :]
    return None


def problems(words: list[str], targets: set[str], options_of: Callable[[str], frozenset[str]]) -> list[str]:
    """What is wrong with one command, as far as can be told without running it."""
    found = []
    if words[0] == 'make':
        goals = [word for word in words[1:] if '=' not in word and not word.startswith('-')]
        found += [f'Makefile has no target {goal!r}' for goal in goals if goal not in targets]
    call = tool_call(words)
    if call is not None:
        tool, arguments = call
        if not (ROOT / tool).is_file():
            return [*found, f'{tool} does not exist']
        options = {argument.split('=')[0] for argument in arguments if argument.startswith('--')}
        found += [f'{tool} has no option {option}' for option in sorted(options - options_of(tool))]
        # $variables and <placeholders> stand for names that only the reader knows
        files = [argument for argument in arguments if re.fullmatch(r'(configs|exp)/[^$<*{]+', argument)]
        found += [f'{name} does not exist' for name in files if not (ROOT / name).exists()]
    return found


@functools.cache
def options_of(tool: str) -> frozenset[str]:
    """The options that a tool's ``--help`` lists."""
    done = subprocess.run(
        [sys.executable, tool, '--help'],
        cwd=ROOT,
        env=command_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, f'{tool} --help ends with {done.returncode}: {done.stderr[-1000:]}'
    return frozenset(re.findall(r'(?<![\w-])--[a-z][\w-]*', done.stdout))


def command_environment() -> dict[str, str]:
    """The environment of the reader, in which the project is installed."""
    return {**os.environ, 'PYTHONPATH': str(ROOT)}


def runnable(source: str) -> str:
    """A block as it is run: `python` and the console entry are the interpreter and the checkout of the tests."""
    python = f'{shlex.quote(sys.executable)} "$@"'
    entry = f'{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / ENTRY_TOOL))} "$@"'
    return f'python() {{ {python}; }}\n{ENTRY}() {{ {entry}; }}\n{source}'


def example(text: str, language: str) -> str:
    """The one block of a language in a Markdown text, with the paths in `_base_` absolute."""
    (source,) = re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    source, changed = re.subn(r"(_base_\s*[=:]\s*'?)(?=(configs|exp)/)", rf'\g<1>{ROOT}/', source)
    assert changed == 1, f'the {language} example has no _base_ in configs/ or exp/'
    return source


@pytest.fixture(scope='module')
def readme() -> str:
    path = ROOT / 'README.md'
    assert path.is_file(), 'README.md is missing'
    return path.read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def blocks(readme: str) -> list[Block]:
    return parse_blocks(readme)


@pytest.fixture(scope='module')
def targets() -> set[str]:
    return make_targets((ROOT / 'Makefile').read_text(encoding='utf-8'))


def test_no_placeholder_is_left(readme: str) -> None:
    assert '@@' not in readme


def test_quick_start_is_there(blocks: list[Block]) -> None:
    commands = [command for block in blocks for command in block.commands]
    assert ['make', 'demo'] in commands
    assert ['make', 'test'] in commands


def test_commands_are_real(blocks: list[Block], targets: set[str]) -> None:
    found = [
        f'README.md, block at line {block.line}, `{shlex.join(command)}`: {problem}'
        for block in blocks
        for command in block.commands
        for problem in problems(command, targets, options_of)
    ]
    assert not found, '\n'.join(found)


def test_marked_blocks_run(blocks: list[Block]) -> None:
    marked = [block for block in blocks if block.run]
    assert marked, f'README.md: no block stands below {RUN_MARK}'
    for block in marked:
        assert block.commands, f'block at line {block.line} is to be run and holds no command'
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', runnable(block.source)],
            cwd=ROOT,
            env=command_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=RUN_LIMIT_SECONDS,
        )
        assert done.returncode == 0, f'block at line {block.line} ends with {done.returncode}: {done.stderr[-2000:]}'


def test_blocks_are_run_by_the_interpreter_of_the_tests() -> None:
    source = runnable('python -c "import sys; print(sys.executable)"\nptqsam-test --help | head -1\npython -c "1 +"\n')
    command = ['bash', '-euo', 'pipefail', '-c', source]
    done = subprocess.run(command, cwd=ROOT, env=command_environment(), capture_output=True, text=True, timeout=120)
    first, second = done.stdout.splitlines()
    assert first == sys.executable and second.startswith(f'usage: {ENTRY}')
    assert done.returncode == 1 and 'SyntaxError' in done.stderr


def test_own_sam_and_own_recipe_build(readme: str, tmp_path: Path) -> None:
    (tmp_path / 'my_sam.py').write_text(example(readme, 'python'))
    (tmp_path / 'mine.yaml').write_text(example(readme, 'yaml'))
    config = load_model_config(str(tmp_path / 'my_sam.py'), {})
    recipe = load_quant_config(tmp_path / 'mine.yaml')
    with torch.device('meta'):
        model = MODELS.build(config.model)
    rules = RuleBook(recipe)
    quantize_model(model.sam, rules)
    built = {quantizer.path: quantizer.bits for quantizer in quantizers(model.sam)}
    assert built == {choice.point.path: choice.bits for choice in rules.enabled}
    assert len(recipe.rules) > 0 and set(built.values()) > {recipe.bits.weight}
    # every rule of the example shows in the model
    for position, rule in enumerate(recipe.rules, start=1):
        decided = [choice for choice in rules.choices if choice.rule.startswith(f'rule {position} ')]
        assert decided, f'rule {position} has no effect'
        assert all(choice.point.path not in built for choice in decided if rule.enabled is False)
        assert all(built[choice.point.path] == rule.bits for choice in decided if rule.bits is not None)


def test_options_for_switches_of_others_are_taken(readme: str) -> None:
    """Right column of the table: every option, on the recipe that its row names or else on SAQ-SAM's."""
    section = readme.split("## From SAQ-SAM's command line")[1].split('\n## ')[0]
    lines = 0
    for row in re.findall(r'^\| `.*', section, re.MULTILINE):
        spans = re.findall('`([^`]+)`', row.split(' | ')[1])
        path = next((span for span in spans if span.startswith('exp/')), 'exp/saq_sam/w4a4.yaml')
        assert (ROOT / path).is_file()
        for words in (span.split() for span in spans if '=' in span):
            options = parse_args(['model.py', path, '--quant-options', *words]).quant_options
            recipe = load_quant_config(ROOT / path, options)
            check_reconstruction(recipe)
            for hook in recipe.hooks:
                build_part(SOLVER_HOOKS, hook.type, **hook.kwargs())
            lines += 1
    assert lines > 15


SAMPLE = r"""
```bash
make demo     # about a minute
make test ARGS="-k rules"
```
<!-- test: run -->

```bash
# a comment alone
PTQSAM_DATA=x python tools/setup_env.py configs/no/such.py exp/$r.yaml \
    --seed 1 --work-dir=out && echo "a b" | cat
```
```python
make nothing
```
"""


def test_parser_reads_blocks() -> None:
    first, second = parse_blocks(SAMPLE)
    assert (first.line, first.run) == (2, False)
    assert first.commands == [['make', 'demo'], ['make', 'test', 'ARGS=-k rules']]
    assert (second.line, second.run) == (8, True)
    arguments = ['configs/no/such.py', 'exp/$r.yaml', '--seed', '1', '--work-dir=out']
    assert second.commands == [['python', 'tools/setup_env.py', *arguments], ['echo', 'a b'], ['cat']]
    assert tool_call(second.commands[0]) == ('tools/setup_env.py', arguments)
    assert subprocess.run(['bash', '-n', '-c', second.source]).returncode == 0
    with pytest.raises(AssertionError, match='line 1'):
        parse_blocks('```bash\nmake')


@pytest.mark.parametrize(
    ('line', 'expected'),
    [
        ('make demo', []),
        ("make -j2 test ARGS='-k rules'", []),
        ('make tests', ["Makefile has no target 'tests'"]),
        ('A=1 python tools/none.py --x', ['tools/none.py does not exist']),
        ('python tools/setup_env.py --seed 1', ['tools/setup_env.py has no option --seed']),
        ('python tools/setup_env.py --limit=2 configs/no.py', ['configs/no.py does not exist']),
        ('python tools/setup_env.py exp/$r.yaml configs/<name>.py exp', []),
        ('for f in exp/*; do python tools/setup_env.py --limit; done', []),
    ],
)
def test_problems_are_found(line: str, expected: list[str]) -> None:
    found = [
        problem
        for words in split_commands(line)
        for problem in problems(words, {'demo', 'test'}, lambda tool: frozenset({'--limit'}))
    ]
    assert found == expected


def test_makefile_targets_are_read(targets: set[str]) -> None:
    assert {'setup', 'demo', 'test', 'lint'} <= targets
    assert 'BIN' not in targets
