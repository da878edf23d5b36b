"""docs/reproduce.md: its commands run, its recipes and options are taken, its numbers are those of the specification.

The specification is looked for in `PTQSAM_METHODS`, by default `../shared/spec/methods.md` beside the checkout; without
it the tests of numbers are skipped.
"""

import functools
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS

from projects.instance_segment_anything import SegmentAnything
from ptqsam.cli import check_key, load_model_config, parse_args
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.report.published import read_published
from ptqsam.solver.forecast import estimate_costs
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.reconstruct import check_reconstruction
from ptqsam.solver.rules import RuleBook
from ptqsam.sweep.cells import Cell
from ptqsam.sweep.cells import expand as cells_of
from ptqsam.sweep.cli import overrides
from ptqsam.sweep.cli import parse_args as parse_sweep_args
from ptqsam.sweep.spec import load_sweep
from tests.test_readme import parse_blocks
from tests.tiny import ARCH, ROOT

DOC = ROOT / 'docs' / 'reproduce.md'
METHODS = Path(os.environ.get('PTQSAM_METHODS', ROOT.parent / 'shared' / 'spec' / 'methods.md'))
# `python` tells what it would do
TELL = """
python() { echo "python ${@@Q}"; }
"""
# where a line of options names no recipe
SOME_RECIPE, SOME_CONFIG = 'exp/ptq4sam/w4a4.yaml', 'configs/yolox/yolox-l_sam-vit-b.py'
DETECTORS = {'FRCNN': 'faster-rcnn_r50', 'YOLOX': 'yolox-l', 'H-DETR': 'hdetr_r50', 'DINO': 'dino_focalnet-l'}


@pytest.fixture(scope='module')
def text() -> str:
    return DOC.read_text(encoding='utf-8')


@functools.cache
def load(recipe: str, options: str = '') -> QuantConfig:
    """A recipe with options as in a command; its parts are built, its quantizers in a small SAM."""
    words = shlex.split(options)
    given = ['--quant-options', *words] if words and not words[0].startswith('-') else words
    args = parse_args(['model.py', recipe, *given])
    for key in args.cfg_options:
        check_key(load_model_config(str(ROOT / SOME_CONFIG), {}), key)
    config = load_quant_config(ROOT / recipe, args.quant_options)
    check_reconstruction(config)
    for hook in config.hooks:
        build_part(SOLVER_HOOKS, hook.type, **hook.kwargs())
    with torch.device('meta'):
        quantize_model(SegmentAnything(ARCH, image_size=64), RuleBook(config))
    return config


def expand(span: str) -> list[str]:
    """`exp/a/{b,c}.yaml` as the files it stands for."""
    match = re.fullmatch(r'(.*)\{(.*)\}(.*)', span)
    return [match[1] + name + match[3] for name in match[2].split(',')] if match else [span]


def rows(text: str) -> list[list[str]]:
    """Cells of all rows of all tables."""
    return [line.strip('| ').split(' | ') for line in text.splitlines() if re.match(r'\| (?!-)', line)]


def test_every_command_is_taken(text: str) -> None:
    commands = []
    for block in parse_blocks(text):
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', TELL + block.source],
            **dict(cwd=ROOT, capture_output=True, text=True, timeout=60),
        )
        assert done.returncode == 0, f'block at line {block.line}: {done.stderr}'
        commands += [shlex.split(line) for line in done.stdout.splitlines()]
    cells: dict[str, list[Cell]] = {}
    for _, tool, *words in commands:
        if tool == 'tools/test_quant.py':
            args = parse_args(words)
            assert (ROOT / args.model_config).is_file(), args.model_config
            given = words[words.index('--quant-options') + 1 :] if '--quant-options' in words else []
            load(args.quant_config, shlex.join(given))
        elif tool == 'tools/sweep.py':
            sweep = parse_sweep_args(words)
            cells.setdefault(str(sweep.work_dir), []).extend(
                cells_of(load_sweep(ROOT / sweep.sweep, overrides(sweep)), sweep.sweep)
            )
        else:
            assert (ROOT / tool).is_file(), tool
    table = [cell for folder, own in cells.items() if folder.startswith('work_dirs/ahcq_table/') for cell in own]
    assert {cell.recipe_name for cell in table} == {'brecq', 'qdrop', 'ptq4sam', 'ahcq_sam'}
    assert len(table) == len({cell.key for cell in table}) == 144


def test_every_recipe_and_option_of_a_table_is_taken(text: str) -> None:
    """A row's options with each of its recipes; what is called published is stamped."""
    options, count = '', 0
    for row in rows(text):
        spans = re.findall('`([^`]+)`', ' | '.join(row))
        own = next((span for span in spans if re.match(r'[\w.]+=', span)), '')
        options = f'{options} {own}' if 'the same and' in row[-1] else options if row[-1] == 'as above' else own
        recipes = [file for span in spans if span.startswith('exp/') for file in expand(span)]
        for recipe in recipes or [SOME_RECIPE] * bool(options):
            config = load(recipe, options)
            assert config.compat.active or 'compat' not in options
            count += 1
        for detector, sam in re.findall(r'`([^`]+)` `(sam-[^`]+)`', ' | '.join(row)):
            assert len(list((ROOT / 'configs').glob(f'*/{detector}_{sam}.py'))) == 1
    assert count > 45


def test_every_option_in_the_text_is_taken(text: str) -> None:
    """Outside of tables and blocks: each with the recipe that is named last in its paragraph."""
    plain = re.sub(r'```.*?```', '', text, flags=re.DOTALL)
    count = 0
    for paragraph in re.split(r'\n\s*\n', plain):
        recipe = SOME_RECIPE
        for span in re.findall('`([^`]+)`', re.sub(r'(?m)^\|.*', '', paragraph).replace('\n', ' ')):
            recipe = span if span.startswith('exp/') and span.endswith('.yaml') else recipe
            if re.search(r'\w\.\w+=', span):
                load(recipe, span)
                count += 1
            elif re.match(r'(configs|exp|tools)/', span):
                assert (ROOT / span).exists(), span
    assert count > 5


@pytest.mark.parametrize('recipe', ['brecq', 'qdrop', 'ptq4sam', 'ahcq_sam'])
def test_the_default_recipes_go_with_a_cascade(recipe: str) -> None:
    """The check that a dry run makes, with a small SAM in a cascade of the grid."""
    config = load_model_config(str(ROOT / SOME_CONFIG.replace('.py', '_cascade.py')), {})
    config.model.sam = dict(type='SegmentAnything', arch=ARCH, image_size=64)
    with torch.device('meta'):
        model = MODELS.build(config.model)
    assert model.options.cascade == 1
    assert estimate_costs(model, load(f'exp/{recipe}/w4a4.yaml'), [16] * 32).plan is not None


def test_links_lead_somewhere(text: str) -> None:
    for target in re.findall(r'\]\(([^)#]+)\)', text):
        assert (DOC.parent / target).is_file(), target


def test_the_published_protocol_is_that_of_the_switches() -> None:
    """The line of AHCQ-SAM has the nine alphas in LNQ's place, its ACNR and CAG where options look for them."""
    config = load('exp/ahcq_sam/w6a6.yaml')
    assert config.hooks[1].type == 'ConditionNumberReduction'
    assert [config.rules[place].quantizer.type for place in (2, 4)] == ['CAG', 'LNQ']


@pytest.fixture(scope='module')
def methods() -> str:
    if not METHODS.is_file():
        pytest.skip(f'no specification of methods at {METHODS}; set PTQSAM_METHODS')
    return METHODS.read_text(encoding='utf-8')


def test_numbers_of_ahcq_sam(text: str, methods: str) -> None:
    ours = {row[0]: row[1:] for row in rows(text)}
    found = re.findall(r'^\| (FRCNN|YOLOX|H-DETR|DINO) ([BLH]) \(([\d.]+)\) \| (.*) \|$', methods, re.MULTILINE)
    assert len(found) == 12
    for detector, size, whole, numbers in found:
        assert ours[f'`{DETECTORS[detector]}` `sam-vit-{size.lower()}`'] == [whole, *numbers.split(' | ')]
    places = {row[1].strip('`'): row[3:] for row in rows(text) if row[2:] and row[2].startswith('`configs/')}
    for detector, size, whole, _ in found:
        assert places[DETECTORS[detector]]['BLH'.index(size)] == whole


def test_numbers_of_saq_sam(text: str, methods: str) -> None:
    section = methods.split('### 9.3')[1].split('### 9.4')[0]
    ours = {row[0].replace(' alone', ' only, no recon'): row[1:4] for row in rows(text.split('## SAQ-SAM')[1])}
    published = {row[0]: [cell.replace(' / ', '/') for cell in row[1:]] for row in rows(section)[1:]}
    assert len(published) == 6
    for name, numbers in published.items():
        assert ours[name] == numbers
    # the ablations are prose there
    for number in re.findall(r'\d+\.\d/\d+\.\d/\d+\.\d', section.split('Ablation')[1] + methods.split('### 6.4')[1]):
        assert number in text, number


def test_published_values_of_reports(text: str) -> None:
    """exp/published.yaml has the numbers of these tables, all of them and no other."""
    sizes, section = ['sam-vit-b', 'sam-vit-l', 'sam-vit-h'], ''
    stated, whole = set(), set()

    def enter(pipeline: str, recipe: str, bits: str, numbers: str) -> None:
        pairs = zip(bits.split('/'), numbers.split('/'), strict=True)
        stated.update((pipeline, recipe, width, float(number)) for width, number in pairs if number != '-')

    for line in text.splitlines():
        section = line.removeprefix('## ') if line.startswith('## ') else section
        row = line.strip('| ').split(' | ') if re.match(r'\| (?!-)', line) else ['']
        spans, files = re.findall(r'`([^`]+)`', row[0]), re.findall(r'exp/(\w+)/(\w+|\{[^}]+\})\.yaml', line)
        recipe = files[0][0] if files else ''
        if section.startswith('AHCQ-SAM') and len(row) == 6 and 'sam-vit' in row[0]:
            whole.add(('_'.join(spans), float(row[1])))
            for name, numbers in zip(('brecq', 'qdrop', 'ptq4sam', 'ahcq_sam'), row[2:], strict=True):
                enter('_'.join(spans), name, 'W4A4/W5A5/W6A6', numbers)
        elif section.startswith('AHCQ-SAM') and recipe == 'ahcq_ablation':
            for size, number in zip(sizes, row[1].split('/'), strict=True):
                enter(f'faster-rcnn_r50_{size}', f'{recipe}_{files[0][1]}', 'W5A5', number)
        elif section == 'PTQ4SAM' and len(spans) == 2:
            enter('_'.join(spans), recipe, 'W6A6/W4A4', row[1])
        elif section == 'SAQ-SAM' and len(row) == 6 and recipe:
            for size, numbers in zip(sizes, row[1:4], strict=True):
                enter(f'dino_focalnet-l_{size}', recipe, 'W6A6/W4A4', numbers)
        elif section == 'SAQ-SAM' and len(row) == 4 and recipe:
            for detector, column in (('yolox-l', row[1]), ('dino_focalnet-l', row[2])):
                for size, number in zip(sizes, column.split('/'), strict=True):
                    enter(f'{detector}_{size}', recipe, 'W4A4', number)
        elif section == 'True boxes' and recipe and row[1:]:
            for size, numbers in zip(sizes[:2], row[1].split('; '), strict=True):
                enter(f'oracle_{size}', recipe, 'W6A6/W4A4', numbers)
    published = read_published()
    assert {(*place, value) for source in published for place, value in source.values.items()} == stated
    assert len(stated) > 200
    ahcq, saq, baq, car = published
    assert set(ahcq.whole.items()) == whole and set(saq.whole.items()) <= whole
    # what the text says of the float models of the other two
    assert baq.whole == {'yolox-l_sam-vit-b': 37.0} and "BAQ's table has 37.0 for YOLOX-L, SAM-B" in text
    assert car.whole == {'oracle_sam-vit-b': 55.8} and '`configs/oracle/oracle_sam-vit-b.py` (FP 55.8)' in text
