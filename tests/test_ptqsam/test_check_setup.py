"""tools/check_setup.py: what it finds missing, wrong or too small, and the commands that it names."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ptqsam import check_assets, check_setup, sources
from ptqsam.check_assets import asset_rows
from ptqsam.check_setup import RANGES, Row, main, package_rows, parse_args, table
from ptqsam.cli import main as dry_run
from ptqsam.coco_files import ARCHIVES
from ptqsam.coco_images import IMAGE_BYTES
from ptqsam.download import CHECKPOINTS, how_to_get
from ptqsam.errors import ConfigError
from tests.coco_server import NAMES, annotations, picture
from tests.tiny import ARCH, ROOT, write_pipeline


def check(*args: object) -> dict[str, Row]:
    """Rows of files, disk and memory by what they are about; a second one of a name has a 2 behind it."""
    rows: dict[str, Row] = {}
    for row in asset_rows(parse_args([str(arg) for arg in args])):
        rows[f'{row.what} 2' if row.what in rows else row.what] = row
    return rows


def stops(rows: dict[str, Row]) -> list[str]:
    """Names of what is missing."""
    return [name for name, row in rows.items() if row.stops]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place without any data or weights, as the environment names it."""
    monkeypatch.setenv('PTQSAM_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path / 'ckpt'))
    monkeypatch.setenv('PTQSAM_CACHE', str(tmp_path / 'cache'))
    return tmp_path


def put_coco(folder: Path, **left_out: str) -> None:
    """Write the very small COCO, without one image of a split."""
    (folder / 'annotations').mkdir(parents=True)
    for split, names in NAMES.items():
        (folder / 'annotations' / f'instances_{split}2017.json').write_bytes(annotations(split))
        (folder / f'{split}2017').mkdir()
        for name in names:
            if name != left_out.get(split):
                (folder / f'{split}2017' / name).write_bytes(picture(name))


def test_complete(tiny) -> None:
    rows = check(tiny / 'tiny.py', tiny / 'recipe.yaml')
    assert {row.state for row in rows.values()} == {'ok'} and not any(row.advice for row in rows.values())
    assert rows['SAM checkpoint'].found.startswith(f'{tiny}/tiny.pth (')
    assert rows['images, evaluate'].found.endswith(': 2 of 2')
    assert rows['images, calibrate'].found.endswith(': 2 of 2')
    assert 'packed' in rows['disk, results'].found and 'memory, calibrate and evaluate' in rows


def test_without_a_recipe_its_defaults_count(tiny) -> None:
    rows = check(tiny / 'tiny.py')
    assert stops(rows) == ['images, calibrate']
    assert '32 wanted, but the calibration set has 4' in rows['images, calibrate'].found
    assert 'disk, results' not in rows


def test_own_sam_without_weights_and_at_an_own_place(scenes, tmp_path) -> None:
    config = write_pipeline(tmp_path, scenes, arch=ARCH)
    assert check(config)['SAM checkpoint'] == Row('', 'SAM checkpoint', 'none in the config: random weights')
    mine = tmp_path / 'mine.pth'
    config = write_pipeline(tmp_path, scenes, mine, arch=ARCH)
    advice = 'no official source is known; put it there by hand'
    assert check(config)['SAM checkpoint'] == Row('missing', 'SAM checkpoint', str(mine), advice)
    mine.write_bytes(b'')
    assert check(config)['SAM checkpoint'] == Row('wrong', 'SAM checkpoint', f'{mine}: it is empty', 'get it again')


def test_nothing_is_there(folders) -> None:
    rows = check(ROOT / 'configs/yolox/yolox-l_sam-vit-b.py', ROOT / 'exp/mse/w6a6.yaml', '--limit', 50)
    subset = 'python tools/download.py coco --subset 50 --num-images 32 --seed 0'
    assert {name: rows[name].advice for name in stops(rows)} == {
        'SAM checkpoint': 'python tools/download.py sam_vit_b',
        'its checkpoint': 'python tools/download.py yolox_l',
        'annotations, evaluate': 'python tools/download.py coco_annotations',
        'annotations, calibrate': 'python tools/download.py coco_annotations',
        'images, evaluate': subset,
        'images, calibrate': subset,
    }
    assert rows['detector'].found == 'YOLOX, 217.1 MB of weights; it is gone before SAM runs'
    assert rows['disk, downloads'].found.startswith(f'{folders}/ckpt: 375.0 MB, and 1 of unknown size, ')
    known = ARCHIVES['coco_annotations']
    size = (known.size + known.unpacked + 82 * IMAGE_BYTES) / 1e6
    assert rows['disk, downloads 2'].found.startswith(f'{folders}/data/coco: {size:.1f} MB, ')
    assert rows['disk, box cache'].found.startswith(f'{folders}/cache: 3.7 MB at most')


def test_what_the_recipe_draws_is_in_the_command(folders, tmp_path) -> None:
    folder = folders / 'data' / 'coco'
    put_coco(folder, train=NAMES['train'][2], val=NAMES['val'][3])
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(
        'algorithm: a\nbits: {weight: 8, act: 8}\ncalibration: {num_images: 4, seed: 3}\ncompat: {first_images: true}\n'
    )
    config = ROOT / 'configs/oracle/oracle_mobile-sam.py'
    rows = check(config, recipe)
    assert rows['images, evaluate'].found == f'{folder}/val2017: 3 of 4'
    assert rows['images, evaluate'].advice == 'python tools/download.py coco_val'
    assert rows['images, calibrate'].found == f'{folder}/train2017: 3 of 4'
    draw = '--num-images 4 --seed 3 --first-images'
    assert rows['images, calibrate'].advice == f'python tools/download.py coco --subset 0 {draw}'
    rows = check(config, recipe, '--limit', 3, '--quant-options', 'compat.first_images=False')
    assert rows['images, evaluate'] == Row('ok', 'images, evaluate', f'{folder}/val2017: 3 of 3')
    (folder / 'annotations' / 'instances_train2017.json').write_text('{')
    row, images = (check(config, recipe)[f'{what}, calibrate'] for what in ('annotations', 'images'))
    assert row.state == 'wrong' and 'damaged' in row.found
    assert (
        row.advice == f'rm {folder}/annotations/instances_train2017.json && python tools/download.py coco_annotations'
    )
    assert images.found == f'{folder}/train2017: 4, but which is known from the annotations only'


def test_embedded_and_own_data(folders) -> None:
    rows = check(ROOT / 'configs/demo/demo.py')
    advice = {row.advice for name, row in rows.items() if name.startswith(('annotations', 'images'))}
    assert advice == {'python tools/make_scenes.py'}
    options = ['--cfg-options', 'calib_dataset.data_root=/other/scenes/', 'test_dataloader.dataset.data_root=/mine/']
    rows = check(ROOT / 'configs/demo/demo.py', *options)
    assert rows['images, calibrate'].advice == 'python tools/make_scenes.py --root /other/scenes'
    assert rows['images, evaluate'].advice == 'no source is known; put them there by hand'


def test_wrong_and_partial_checkpoints(folders) -> None:
    ckpt, config = folders / 'ckpt', ROOT / 'configs/demo/demo.py'
    ckpt.mkdir()
    (ckpt / 'mobile_sam.pt').write_bytes(b'cut off')
    row = check(config)['SAM checkpoint']
    assert row.state == 'wrong' and row.found.endswith('it has 7 bytes, not 40,728,226')
    assert row.advice == f'rm {ckpt}/mobile_sam.pt && python tools/download.py mobile_sam'
    (ckpt / 'mobile_sam.pt').rename(ckpt / 'mobile_sam.pt.part')
    row = check(config)['SAM checkpoint']
    assert row.state == 'missing' and row.found.endswith('mobile_sam.pt (7 bytes of a download are there)')


def test_files_that_other_projects_have_under_other_names(folders) -> None:
    ckpt, config = folders / 'ckpt', ROOT / 'configs/hdetr/hdetr_r50_sam-vit-b.py'
    (ckpt / 'r50_hdetr.pth').parent.mkdir()
    (ckpt / 'r50_hdetr.pth').write_bytes(b'weights')
    path = ckpt / CHECKPOINTS['hdetr_r50'].file_name
    rows = check(config)
    row, command = rows['its checkpoint'], f'ln -s r50_hdetr.pth {path}'
    assert row == Row('missing', 'its checkpoint', f'{path}, but r50_hdetr.pth lies there', command)
    assert rows['disk, downloads'].found.startswith(f'{ckpt}: 375.0 MB, '), 'SAM alone'
    assert how_to_get(path) == f'run `{command}`'
    subprocess.run(command, shell=True, check=True)
    assert check(config)['its checkpoint'] == Row('ok', 'its checkpoint', f'{path} (0.0 MB, hash not published)')


def test_other_content_under_the_other_name_is_not_taken(folders) -> None:
    ckpt, config = folders / 'ckpt', ROOT / 'configs/yolox/yolox-l_sam-vit-b.py'
    ckpt.mkdir()
    (ckpt / 'yolox_l.pth').write_bytes(b"Megvii's")
    assert check(config)['its checkpoint'].advice == 'python tools/download.py yolox_l'
    (ckpt / 'yolox_l.pth').rename(ckpt / CHECKPOINTS['yolox_l'].file_name)
    row = check(config)['its checkpoint']
    assert row.state == 'wrong' and row.found.endswith('not d3bd2b23')


def test_detector_of_other_classes(tiny) -> None:
    options = ['--cfg-options', 'model.detector=mmdet::yolox/yolox_tiny_8xb8-300e_coco.py']
    rows = check(tiny / 'tiny.py', tiny / 'recipe.yaml', *options)
    found = 'of the detector, 80, are not those of the data, 5'
    assert rows['classes, evaluate'].found == rows['classes, calibrate'].found == found
    assert {'classes, evaluate', 'classes, calibrate'} < set(stops(rows))


def test_too_small_a_disk(folders, monkeypatch) -> None:
    usage = SimpleNamespace(free=1_400_000_000)
    monkeypatch.setattr(sources.shutil, 'disk_usage', lambda path: usage)
    config = ROOT / 'configs/oracle/oracle_sam-vit-b.py'
    row = check(config)['disk, downloads 2']
    assert row.state == 'full' and '2.4 GB, 1.4 GB are free' in row.found
    assert check(config, '--limit', 2)['disk, downloads'].state == 'ok', '0.4 and 0.8 GB'
    usage.free = 1_000_000_000
    row = check(config, '--limit', 2)['disk, downloads']
    assert row.state == 'full' and '375.0 MB (1.1 GB together with the rest on this disk)' in row.found


def test_little_memory_is_told_but_stops_nothing(tiny, monkeypatch) -> None:
    monkeypatch.setattr(check_assets.os, 'sysconf', lambda name: 10)
    rows = check(tiny / 'tiny.py', tiny / 'recipe.yaml')
    assert rows['memory, calibrate and evaluate'].state == 'tight' and not stops(rows)
    assert 'chunk_size' in rows['memory, calibrate and evaluate'].advice


def test_memory_of_a_hook_is_that_of_the_dry_run(tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr('ptqsam.hooks.condition_number.MEASURED_TOGETHER', 10**15)
    monkeypatch.setattr('ptqsam.hooks.condition_number.measuring_bytes', lambda op: 10**12)
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nhooks: [{{type: ConditionNumberReduction}}]\n')
    row = check(tiny / 'tiny.py', recipe)['memory, ConditionNumberReduction']
    assert row.state == 'tight'
    assert dry_run([str(tiny / 'tiny.py'), str(recipe), '--dry-run']) == 0
    (told,) = [line.split() for line in capsys.readouterr().out.split('\n') if line.startswith('ConditionN')]
    assert float(row.found.split()[1]) == pytest.approx(float(told[-2]), rel=1e-2) and float(told[-2]) > 1000


def test_hooks_that_undo_each_other_are_refused(tiny, tmp_path) -> None:
    recipe = tmp_path / 'recipe.yaml'
    hooks = '[{type: ScaleReparameterization}, {type: ConditionNumberReduction}]'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nhooks: {hooks}\n')
    with pytest.raises(ConfigError, match='list ConditionNumberReduction before ScaleReparameterization'):
        check(tiny / 'tiny.py', recipe)


def test_reconstruction_has_rows_of_its_own(tiny, tmp_path) -> None:
    recipe = tmp_path / 'recipe.yaml'
    text = f'_base_: {tiny / "recipe.yaml"}\nreconstruction: {{preset: fast, iters: 3, cache: {{store: disk}}}}\n'
    recipe.write_text(text)
    rows = check(tiny / 'tiny.py', recipe)
    assert not stops(rows) and 'activation cache' in rows['disk, results'].found and 'memory, reconstruct' in rows


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['configs/none.py'], 'no such model config'),
        (['configs/demo/demo.py', 'exp/none.yaml'], 'exp/none.yaml'),
        (['configs/demo/demo.py', '--cfg-options', 'model.sam.archh=vit_b'], "no key 'model.sam.archh'"),
        (['configs/yolox/yolox-l_sam-vit-b.py', '--cfg-options', 'model.detector=mmdet::none.py'], 'cannot read this'),
        (['configs/demo/demo.py', '--cfg-options', 'model.type=Nothing'], 'cannot be built'),
        (
            ['configs/yolox/yolox-nano_mobile-sam.py', '--cfg-options', 'calib_dataset.type=None'],
            'the data to calibrate: cannot be built',
        ),
        (['configs/demo/demo.py', 'exp/mse/w6a6.yaml', '--quant-options', 'calibration.max_boxes=999'], 'chunk_size'),
    ],
)
def test_bad_configs(folders, capsys, monkeypatch, words, message) -> None:
    monkeypatch.chdir(ROOT)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith('error: ') and message in line


@pytest.mark.parametrize('words', [[], ['a.py', '--limit', '0'], ['a.py', '--quant-options', 'bits.act=4']])
def test_bad_usage(words, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2


# --- packages


def test_ranges_are_those_of_the_package() -> None:
    text = (ROOT / 'setup.py').read_text(encoding='utf-8')
    for name, (least, below) in RANGES.items():
        assert f'{name}>={least}{f",<{below}" if below else ""}' in text, name


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Let packages have other versions, or be missing (None)."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, 'version', version)


@pytest.mark.parametrize(
    ('versions', 'state', 'found'),
    [
        (dict(mmcv='2.2.0'), 'wrong', 'version 2.2.0; 2.1 or newer and below 2.2 is needed'),
        (dict(mmcv=None), 'missing', 'not installed'),
        (dict(numpy='1.26.4'), 'wrong', 'version 1.26.4; 2.0 or newer and below 3 is needed'),
        (dict(torch='2.5.1+cu124'), 'wrong', 'version 2.5.1+cu124; 2.6 or newer and below 3 is needed'),
        (dict(mmdet='3.4.0'), 'wrong', 'version 3.4.0; 3.3 or newer and below 3.4 is needed'),
    ],
)
def test_packages_that_break_stop_everything(monkeypatch, capsys, versions, state, found) -> None:
    pretend(monkeypatch, **{'onedl-mmcv': None, 'onedl-mmdetection': None}, **versions)
    (name,) = versions
    (row,) = [row for row in package_rows() if row.stops]
    assert row == Row(state, name, found, 'make setup')
    code = main(['no/such/config.py'])
    assert code == 3, 'nothing else is looked at'
    assert 'the rest cannot be checked' in capsys.readouterr().err


def test_forks_have_versions_of_their_own(monkeypatch) -> None:
    pretend(monkeypatch, mmcv=None, mmdet=None, **{'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1'})
    first, *_ = package_rows()
    assert first.state == 'ok' and 'mmcv 2.3.6' in first.found and 'mmdet 3.5.1' in first.found


def test_operators_of_mmcv(monkeypatch) -> None:
    real = check_setup.importlib.import_module
    everything = {name: None for name in check_setup.OPERATORS}
    built_for = SimpleNamespace(**everything, get_compiling_cuda_version=lambda: 'not available')
    parts = {'mmcv._ext': built_for, 'torch': SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True))}

    def imported(name: str) -> object:
        if parts.get(name, 0) is None:
            raise ImportError(f'undefined symbol in {name}')
        return parts.get(name) or real(name)

    monkeypatch.setattr(check_setup.importlib, 'import_module', imported)
    row = package_rows()[-1]
    assert row.state == 'wrong' and row.found == 'compiled without CUDA, but there is a GPU'
    parts['mmcv._ext'] = SimpleNamespace(nms=None)
    assert package_rows()[-1].found == 'without roi_align_forward, ms_deform_attn_forward'
    parts['mmcv._ext'] = None
    row = package_rows()[-1]
    assert row.state == 'missing' and 'undefined symbol' in row.found and '--no-build-isolation' in row.advice


def test_table() -> None:
    text = table([Row('ok', 'a', 'there'), Row('missing', 'long', 'x.pth', 'get it'), Row('', 'b', '')])
    assert text.split('\n') == [
        'ok       a     there',
        'missing  long  x.pth',
        '               -> get it',
        '         b',
    ]


def test_tool(tiny) -> None:
    command = [sys.executable, 'tools/check_setup.py', str(tiny / 'tiny.py'), str(tiny / 'recipe.yaml')]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')
    lines = done.stdout.splitlines()
    assert (
        lines[0].startswith('ok       packages ') and lines[-1] == f'{tiny}/tiny.py with {tiny}/recipe.yaml: complete'
    )


def test_exit_code_counts_what_is_missing(tiny, capsys) -> None:
    assert main([str(tiny / 'tiny.py')]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == f'{tiny}/tiny.py: 1 problem, see above'
    options = ['--cfg-options', 'model.sam.checkpoint=/none/sam.pth']
    assert main([str(tiny / 'tiny.py'), *options]) == 3
    assert capsys.readouterr().out.splitlines()[-1] == f'{tiny}/tiny.py: 2 problems, see above'
