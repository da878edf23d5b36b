"""From the YAML of a sweep to its cells: axes, exclude, include, names, keys, and what is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from ptqsam.errors import ConfigError
from ptqsam.sweep.cells import Cell, expand
from ptqsam.sweep.spec import load_sweep
from tests.test_sweep.helpers import write_sweep
from tests.tiny import ROOT, write_pipeline

SWEEPS = sorted((ROOT / 'exp' / 'sweeps').glob('*.yaml'))


@pytest.fixture
def sweep(tmp_path, tiny):
    """Cells of the tiny sweep with changes; see `write_sweep`."""

    def cells(axes: dict | None = None, narrowed: bool = False, **settings) -> list[Cell]:
        path = write_sweep(tmp_path, tiny, axes, **settings)
        return expand(load_sweep(path), str(path), narrowed)

    return cells


def names(cells: list[Cell]) -> list[str]:
    return [cell.name.split('/')[1] for cell in cells]


def test_axes_multiply_and_the_first_turns_slowest(sweep):
    cells = sweep({'seed': [0, 1], 'calibration.num_images': [1, 2]})
    assert len(cells) == 8 and len({cell.key for cell in cells}) == 8
    stem = cells[0].recipe_name
    assert names(cells)[:3] == [
        f'{stem}_w4a4_seed0_num_images=1',
        f'{stem}_w4a4_seed0_num_images=2',
        f'{stem}_w4a4_seed1_num_images=1',
    ]
    assert [cell.seed for cell in cells[:3]] == [0, 0, 1]
    assert cells[0].varied == {'calibration.num_images': 1}
    assert '--seed' in cells[0].arguments and 'calibration.num_images=1' in cells[0].arguments
    assert {cell.model_name for cell in cells} == {'tiny'}


def test_weight_and_activation_bits_are_axes(sweep):
    cells = sweep({'bits': None, 'weight_bits': [4, 8], 'act_bits': [6, 8]})
    widths = [(4, 6), (4, 8), (8, 6), (8, 8)]
    assert [(cell.bits['weight'], cell.bits['act']) for cell in cells] == widths
    assert [cell.name[-4:] for cell in cells] == [f'w{weight}a{act}' for weight, act in widths]


def test_exclude_names_globs_and_include_adds(sweep):
    cells = sweep({'seed': [0, 1]}, exclude=[{'bits': 'w6*', 'seed': 1}], include=[{'bits': 'w8a8', 'seed': 2}])
    assert [(cell.bits['weight'], cell.seed) for cell in cells] == [(4, 0), (4, 1), (6, 0), (8, 2)]


def test_key_depends_on_what_is_computed_and_on_nothing_else(sweep, tmp_path, tiny, scenes, monkeypatch):
    first = sweep()
    assert [cell.key for cell in sweep()] == [cell.key for cell in first], 'the same sweep, the same keys'
    retitled = sweep(title='other', resources={'threads': 2}, wandb='project')
    assert [cell.key for cell in retitled] == [cell.key for cell in first]
    seeds = sweep({'seed': [0, 1]})
    assert seeds[0].key == first[0].key, 'the seed that the recipe has anyway'
    assert seeds[0].folder == first[0].folder and seeds[0].name != first[0].name, 'so its result is found again'
    limited = sweep(run={'limit': 1})
    assert limited[0].key != first[0].key
    assert sweep({'bits': ['w6a6', 'w5a5']})[0].key == first[1].key, 'another grid, the same cell'

    (tmp_path / 'copy').mkdir()
    other = torch.load(tiny / 'tiny.pth')
    torch.save(other, tmp_path / 'copy' / 'tiny.pth')
    config = write_pipeline(tmp_path / 'copy', scenes, tmp_path / 'copy' / 'tiny.pth')
    before = sweep({'model': str(config)})
    next(iter(other.values())).add_(1)
    torch.save(other, tmp_path / 'copy' / 'tiny.pth')
    assert sweep({'model': str(config)})[0].key != before[0].key, 'other weights in the same file'


def test_options_of_the_sweep_reach_all_cells_and_axes_win(sweep):
    cells = sweep(
        {'cfg:model.test_cfg.max_boxes': [3, 5]},
        run={'quant': {'calibration.num_images': 1}, 'cfg': {'model.test_cfg.max_boxes': 7}, 'eval_fp': False},
    )
    assert all('calibration.num_images=1' in cell.arguments and '--eval-fp' not in cell.arguments for cell in cells)
    assert 'model.test_cfg.max_boxes=3' in cells[0].arguments and 'max_boxes=3' in cells[0].name


def test_key_does_not_depend_on_where_things_lie(sweep, tmp_path, tiny, scenes, monkeypatch):
    keys = []
    for place in ('here', 'there'):
        (tmp_path / place).mkdir()
        shutil.copy(tiny / 'tiny.pth', tmp_path / place)
        monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path / place))
        config = write_pipeline(tmp_path / place, scenes, tmp_path / place / 'tiny.pth')
        keys.append([cell.key for cell in sweep({'model': str(config)})])
    assert keys[0] == keys[1]


def test_axes_of_the_command_line_may_leave_nothing_to_exclude_or_include(sweep):
    settings = dict(exclude=[{'bits': 'w6a6'}], include=[{'bits': 'w4a4', 'seed': 1}])
    with pytest.raises(ConfigError, match='compute the same'):
        sweep({'seed': [0, 1]}, **settings)
    with pytest.raises(ConfigError, match='matches no cell'):
        sweep({'bits': ['w4a4']}, **settings)
    assert [cell.seed for cell in sweep({'bits': ['w4a4']}, narrowed=True, **settings)] == [0, 1]
    assert [cell.seed for cell in sweep({'seed': [1]}, narrowed=True, **settings)] == [1]


def test_folder_of_the_recipe_and_bits_name_the_file(sweep):
    cells = sweep({'model': 'configs/demo/demo.py', 'recipe': ['mse', 'minmax'], 'bits': ['w4a4', 'w4a8']})
    assert [cell.name for cell in cells] == [
        'demo/mse_w4a4',
        'demo/mse_w4a8',
        'demo/minmax_w4a4',
        'demo/minmax_w4a8',
    ]
    assert Path(cells[1].recipe).samefile(ROOT / 'exp/mse/w4a8.yaml')
    assert not any('bits' in word for word in cells[0].arguments)


@pytest.mark.parametrize(
    'axes, settings, message',
    [
        ({'bitz': ['w4a4']}, {}, r"unknown axis 'bitz' \(did you mean 'bits'\?\)"),
        ({'model': 'configs/yolox/yolox-l_sam-vit-c.py'}, {}, r"no pipeline .*did you mean 'configs/yolox/yolox-l_sam"),
        ({'recipe': 'ahcq_sm'}, {}, r"no folder of recipes ahcq_sm \(did you mean 'ahcq_sam'\?\)"),
        ({'recipe': 'exp/mse/w4a5.yaml'}, {}, r'no recipe exp/mse/w4a5.yaml \(did you mean'),
        ({'recipe': 'mse', 'bits': 'w3a3'}, {}, r'mse has no w3a3.yaml \(there: w4a4'),
        ({'bits': ['4']}, {}, "bits '4' must be like w4a4"),
        ({'bits': []}, {}, 'no cell is left'),
        ({}, {'exclude': [{'bits': 'w*'}]}, 'no cell is left'),
        ({}, {'exclude': [{'bits': 'w9*'}]}, 'exclude 1 .* matches no cell'),
        ({}, {'exclude': [{'seed': 0}]}, "exclude 1 names 'seed', which is no axis"),
        ({'seed': ['x']}, {}, "seed 'x' must be a whole number"),
        ({'calibration.num_image': [1]}, {}, r"unknown key 'calibration.num_image' \(did you mean 'num_images'\?\)"),
        ({'cfg:model.test_cfg.max_box': [1]}, {}, r"no key 'model.test_cfg.max_box'"),
        ({'bits': ['w4a4', 'w4a4']}, {}, 'two cells compute the same'),
        ({'seed': [0]}, {'include': [{'bits': 'w4a4'}]}, 'two cells compute the same'),
        ({}, {'run': {'limits': 3}}, r"unknown key 'run.limits' \(did you mean 'limit'\?\)"),
        ({}, {'axis': {}}, r"unknown key 'axis' \(did you mean 'axes'\?\)"),
        ({}, {'resources': {'threads': 0}}, "key 'resources.threads'"),
        ({'algorithm': ['a=b c']}, {}, r"unknown axis 'algorithm' \(axes: model"),
    ],
)
def test_bad_sweep_is_one_line(sweep, axes, settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        sweep(axes, **settings)
    assert 'grid.yaml' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize('content', ['a: [', '- 1', ''])
def test_file_that_is_no_sweep(tmp_path, content):
    (tmp_path / 'bad.yaml').write_text(content)
    with pytest.raises(ConfigError, match=r'bad.yaml'):
        load_sweep(tmp_path / 'bad.yaml')
    with pytest.raises(ConfigError, match='no such sweep'):
        load_sweep(tmp_path / 'none.yaml')


def test_command_line_replaces_axes_and_options_one_by_one(tmp_path, tiny):
    path = write_sweep(tmp_path, tiny, run={'limit': 2, 'quant': {'calibration.num_images': 1}})
    given = {'axes': {'bits': 'w5a5'}, 'run': {'quant': {'calibration.max_boxes': 2}}}
    [cell] = expand(load_sweep(path, given), str(path))
    assert cell.bits == {'weight': 5, 'act': 5}
    assert {'calibration.num_images=1', 'calibration.max_boxes=2', '--limit'} <= set(cell.arguments)


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_can_be_run(path):
    """Every pipeline, recipe and option in them is there; papers' grids have the papers' cells."""
    cells = expand(load_sweep(path), str(path))
    assert len(cells) >= (12 if path.stem.startswith(('demo', 'coco')) else 5)
    assert all(re.fullmatch(r'[\w.-]+/[\w.=,+-]+', cell.name) for cell in cells)
    raw = yaml.safe_load(path.read_text())
    if path.stem in ('faster-rcnn_r50', 'yolox-l', 'hdetr_r50', 'dino_focalnet-l'):
        assert len(cells) == 3 * 4 * 3 and all(
            model.split('/')[-1].startswith(path.stem) for model in raw['axes']['model']
        )
