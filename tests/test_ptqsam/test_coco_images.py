"""Single images of COCO: which ones a run needs, and fetching them over several connections."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from projects.instance_segment_anything import CheckedCocoDataset
from ptqsam import coco_images, sources
from ptqsam.cli import main
from ptqsam.coco_images import CONNECTIONS, fetch_subset, read_images
from ptqsam.errors import AssetError, ConfigError
from ptqsam.solver.calibrate import draw_images
from ptqsam.solver.datasets import image_names
from tests.coco_server import NAMES, annotations, coco_server, picture
from tests.servers import Server
from tests.tiny import ARCH, ROOT, write_pipeline


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with coco_server(monkeypatch) as state:
        yield state


def fetch(data: Path, limit: int = 2, num_images: int = 3, **options):
    return fetch_subset(data, limit, num_images, progress=False, **options)


def images(data: Path) -> dict[str, list[str]]:
    return {split: sorted(path.name for path in (data / 'coco' / f'{split}2017').iterdir()) for split in NAMES}


@pytest.mark.parametrize('seed', [0, 7])
def test_images_are_those_that_a_run_reads(server, tmp_path, seed) -> None:
    fetch(tmp_path, seed=seed)
    root = tmp_path / 'coco'
    names = {}
    for split in NAMES:
        dataset = CheckedCocoDataset(
            data_root=str(root),
            ann_file=f'annotations/instances_{split}2017.json',
            data_prefix=dict(img=f'{split}2017/'),
            metainfo=dict(classes=('person',)),
            test_mode=True,
            pipeline=[],
        )
        names[split] = image_names(dataset)
    drawn = [names['train'][index] for index in draw_images(names['train'], names['val'], 3, seed)]
    assert images(tmp_path) == dict(val=sorted(names['val'][:2]), train=sorted(drawn))
    assert not list(root.glob('*.zip')), 'the archive of annotations is gone'
    assert (root / 'val2017' / names['val'][0]).read_bytes() == picture(names['val'][0])


def test_limits(server, tmp_path) -> None:
    found = fetch(tmp_path, limit=0, first=True)
    assert images(tmp_path) == dict(val=[], train=sorted(NAMES['train'][:3])) and found.val == []
    fetch(tmp_path, limit=99)
    assert images(tmp_path)['val'] == sorted(NAMES['val'])
    with pytest.raises(ConfigError, match=r'7 wanted, but the calibration set has 6'):
        fetch(tmp_path, num_images=7)


def test_whole_images_stay_and_broken_ones_are_fetched_again(server, tmp_path) -> None:
    fetch(tmp_path, limit=4)
    folder = tmp_path / 'coco' / 'val2017'
    cut, other, empty, whole = NAMES['val']
    (folder / cut).write_bytes(picture(cut)[:-40])
    Image.new('RGB', (5, 5)).save(folder / other)
    (folder / empty).write_bytes(b'')
    server.asked.clear()
    fetch(tmp_path, limit=4)
    assert sorted(asked[0] for asked in server.asked) == sorted(f'/val2017/{name}' for name in (cut, other, empty))
    assert [(folder / name).read_bytes() for name in NAMES['val']] == list(map(picture, NAMES['val']))
    assert (folder / whole).exists()


def test_a_cut_connection_goes_on_and_a_part_of_unknown_origin_does_not(server, tmp_path) -> None:
    fetch(tmp_path, limit=0)
    name = NAMES['val'][0]
    part = tmp_path / 'coco' / 'val2017' / f'{name}.part'
    part.write_bytes(picture(name)[:100])
    server.asked.clear()
    server.cuts = [50]
    fetch(tmp_path, limit=1)
    assert [asked[1] for asked in server.asked] == [None, 'bytes=50-']
    assert images(tmp_path)['val'] == [name] == [path.name for path in part.parent.iterdir()]


def test_image_that_is_not_on_the_server(server, tmp_path) -> None:
    missing = NAMES['val'][1]
    del server.files[f'/val2017/{missing}']
    with pytest.raises(AssetError) as error:
        fetch(tmp_path, limit=4)
    text = str(error.value)
    assert '\n' not in text and '1 of 7 images did not come; what came is kept, run the same command again' in text
    assert f'{missing}: no source gave the file' in text and 'HTTP 404' in text
    assert images(tmp_path)['val'] == sorted({*NAMES['val']} - {missing}), 'the others came all the same'


def test_server_that_sends_something_else(server, tmp_path) -> None:
    name = NAMES['val'][0]
    server.files[f'/val2017/{name}'] = b'not an image'
    with pytest.raises(AssetError, match=r'not the official file, it cannot be decoded \(.*\); what came was deleted'):
        fetch(tmp_path, limit=1)
    assert images(tmp_path)['val'] == []


def test_gives_up_when_nothing_comes(server, tmp_path, monkeypatch) -> None:
    fetch(tmp_path, limit=0)
    monkeypatch.setattr(coco_images, 'CONNECTIONS', 2)
    server.status = 503
    server.asked.clear()
    with pytest.raises(AssetError, match=r'2 of 7 images did not come.*HTTP 503'):
        fetch(tmp_path, limit=4)
    assert 2 <= len(server.asked) <= 4 < CONNECTIONS


def test_full_disk(server, tmp_path, monkeypatch) -> None:
    fetch(tmp_path, limit=0)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, 'disk_usage', lambda path: usage._replace(free=100_000))
    with pytest.raises(ConfigError, match=r'2 images needs 0\.3 MB of disk, 0\.1 MB are free'):
        fetch(tmp_path, limit=2)
    fetch(tmp_path, limit=0)


def test_folder_that_cannot_be_written(server, tmp_path) -> None:
    fetch(tmp_path, limit=0)
    shutil.rmtree(tmp_path / 'coco' / 'val2017')
    (tmp_path / 'coco' / 'val2017').write_text('a file')
    with pytest.raises(ConfigError, match=r'coco: cannot be written or read \(.*\); choose another folder with --data'):
        fetch(tmp_path)


# --- annotation files


def test_list_of_images_is_read_without_the_rest(tmp_path) -> None:
    path = tmp_path / 'instances.json'
    content = json.loads(annotations('val'))
    path.write_bytes(annotations('val')[:-50])
    assert read_images(path) == content['images'], 'what comes behind the list is not parsed'
    path.write_text(json.dumps(dict(info=dict(images=4), **content)))
    assert read_images(path) == content['images'], 'another thing of that name comes first'
    path.write_text(json.dumps(content, indent=1))
    assert read_images(path) == content['images']


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('', 'damaged or has no list of images'),
        ('{"annotations": []}', "damaged or has no list of images \\('images'\\)"),
        ('{"images": [{"id": 1}', 'damaged or has no list'),
        ('{"images": [{"id": 1}]}', "damaged or has no list of images \\('file_name'\\)"),
        ('{"images": 3}', 'damaged or has no list'),
        ('[]', 'damaged or has no list'),
    ],
)
def test_damaged_annotations_are_named(tmp_path, text, message) -> None:
    path = tmp_path / 'coco' / 'annotations' / 'instances_val2017.json'
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(AssetError, match=f'{message}.*; fetch it with `python tools/download.py coco_annotations'):
        read_images(path)


def test_annotations_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(AssetError, match=r'none\.json: cannot read this annotation file \(No such file or directory\)'):
        read_images(tmp_path / 'none.json')
    (tmp_path / 'a.json').write_bytes(b'\xff\xfe\xfa')
    with pytest.raises(AssetError, match=r'cannot read this annotation file \(no text\); get or make it again'):
        read_images(tmp_path / 'a.json')


# --- with the run itself

CONFIG = """
_base_ = {base!r}
root = {root!r}
for_coco = dict(data_root=root, metainfo=dict(classes=('person',)))
calib_dataset = dict(for_coco, ann_file='annotations/instances_train2017.json', data_prefix=dict(img='train2017/'))
test_dataloader = dict(
    dataset=dict(for_coco, ann_file='annotations/instances_val2017.json', data_prefix=dict(img='val2017/'))
)
test_evaluator = [dict(type='SubsetCocoMetric', ann_file=root + 'annotations/instances_val2017.json', metric='segm')]
del root, for_coco
"""


def test_a_run_with_limit_needs_no_more(server, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = write_pipeline(tmp_path, tmp_path / 'none', arch=ARCH)
    config, recipe = tmp_path / 'coco.py', tmp_path / 'recipe.yaml'
    config.write_text(CONFIG.format(base=str(base), root=f'{tmp_path}/coco/'))
    recipe.write_text('algorithm: tiny\nbits: {weight: 4, act: 8}\ncalibration: {num_images: 3}\n')
    command = [str(config), str(recipe), '--limit', '2', '--work-dir', 'out']
    assert main(command) == 3
    advice = f'fetch it with `python tools/download.py coco_annotations --data {tmp_path}`'
    (line,) = capsys.readouterr().err.splitlines()
    assert f'instances_val2017.json: no such annotation file; {advice}, or set PTQSAM_DATA' in line
    fetch(tmp_path, limit=2)
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])['images'] == 2
    (tmp_path / 'coco' / 'val2017' / NAMES['val'][1]).unlink()
    assert main(command) == 3
    advice = f'fetch it with `python tools/download.py coco_val --data {tmp_path}`'
    assert advice in capsys.readouterr().err.splitlines()[-1]


CLI = """
import runpy, sys
import pytest
from tests.coco_server import coco_server
with pytest.MonkeyPatch.context() as patch, coco_server(patch):
    sys.argv = ['tools/download.py', *sys.argv[1:]]
    runpy.run_path('tools/download.py', run_name='__main__')
"""


def test_command_line(tmp_path) -> None:
    def tool(*args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, '-c', CLI, *args, '--data', str(tmp_path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    done = tool('coco', '--subset', '2', '--num-images', '3', '--seed', '1')
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{tmp_path}/coco: the first 2 images of val2017, 3 of train2017\n'
    done = tool('coco', '--list')
    folders, table = done.stdout.splitlines()[:3], [line.split() for line in done.stdout.splitlines()[-3:]]
    assert done.returncode == 0 and folders == [
        f'{tmp_path}/coco/{folder}' for folder in ('annotations', 'val2017', 'train2017')
    ]
    assert images(tmp_path) == {split: sorted(names) for split, names in NAMES.items()}
    assert {row[0]: row[2:5] for row in table} == {
        'coco_annotations': ['yes,', '2', 'files'],
        'coco_val': ['yes,', '4', 'images'],
        'coco_train': ['yes,', '6', 'images'],
    }
