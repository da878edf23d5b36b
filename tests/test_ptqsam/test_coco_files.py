"""Archives of COCO: fetched, unpacked safely, resumed, and what is said when something is wrong."""

import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ptqsam import coco_files, sources
from ptqsam.coco_files import ARCHIVES, coco_root, fetch_advice, fetch_archives
from ptqsam.errors import AssetError, ConfigError
from tests.coco_server import NAMES, annotations, archive, coco_server, picture, publish
from tests.servers import Server
from tests.tiny import ROOT

TABLE = dict(ARCHIVES)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with coco_server(monkeypatch) as state:
        yield state


def fetch(*names: str, data: Path, **options: bool) -> list[Path]:
    return list(fetch_archives(names, data, progress=False, **options))


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob('*') if path.is_file())


def test_table_is_sound() -> None:
    assert list(TABLE) == ['coco_annotations', 'coco_val', 'coco_train']
    for known in TABLE.values():
        assert [source.url.rpartition('/')[2] for source in known.sources] == [known.file_name] * 2
        assert len(known.sha256) == 64 and known.size is not None and known.unpacked > known.size
    text = (ROOT / 'data' / 'README.md').read_text(encoding='utf-8')
    for known in TABLE.values():
        (row,) = [line for line in text.splitlines() if line.startswith(f'| {known.name} |')]
        facts = [str(known.sources[0]), f'{known.size:,}', known.sha256, f'`coco/{known.folder}/`']
        assert [fact for fact in facts if fact not in row] == []


def test_root_comes_from_argument_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PTQSAM_DATA', 'elsewhere')
    assert coco_root('here') == Path('here/coco') and coco_root() == Path('elsewhere/coco')
    monkeypatch.delenv('PTQSAM_DATA')
    assert coco_root() == Path('data/coco')


def test_everything_is_unpacked_and_nothing_else(server, tmp_path) -> None:
    root = tmp_path / 'data' / 'coco'
    folders = fetch(*ARCHIVES, data=tmp_path / 'data')
    assert folders == [root / 'annotations', root / 'val2017', root / 'train2017']
    expected = [f'annotations/instances_{split}2017.json' for split in NAMES]
    expected += [f'{split}2017/{name}' for split, names in NAMES.items() for name in names]
    assert tree(tmp_path) == sorted(f'data/coco/{name}' for name in expected), 'no archive, no part, nothing outside'
    assert (root / 'val2017' / NAMES['val'][0]).read_bytes() == picture(NAMES['val'][0])
    asked = len(server.asked)
    assert fetch(*ARCHIVES, data=tmp_path / 'data') == folders and len(server.asked) == asked == 3


def test_archive_may_be_kept_and_may_come_by_hand(server, tmp_path) -> None:
    fetch('coco_val', data=tmp_path, keep_archives=True)
    shutil.rmtree(tmp_path / 'coco' / 'val2017')
    fetch('coco_val', data=tmp_path)
    assert len(server.asked) == 1 and len(tree(tmp_path)) == len(NAMES['val'])


def test_what_is_there_stays_unless_it_is_cut_off(server, tmp_path) -> None:
    folder = tmp_path / 'coco' / 'val2017'
    folder.mkdir(parents=True)
    kept, broken, *_ = NAMES['val']
    own = picture(kept)[:-2] + b'me'
    (folder / kept).write_bytes(own)
    (folder / broken).write_bytes(b'cut off')
    (folder / 'mine.txt').write_text('')
    fetch('coco_val', data=tmp_path)
    assert (folder / kept).read_bytes() == own and (folder / broken).read_bytes() == picture(broken)
    assert tree(folder) == sorted([*NAMES['val'], 'mine.txt'])
    texts = tmp_path / 'coco' / 'annotations'
    texts.mkdir()
    (texts / 'instances_val2017.json').write_text('my part of COCO')
    fetch('coco_annotations', data=tmp_path)
    assert (texts / 'instances_val2017.json').read_text() == 'my part of COCO'
    assert (texts / 'instances_train2017.json').read_bytes() == annotations('train')


def test_interrupted_unpacking_goes_on(server, tmp_path, monkeypatch) -> None:
    written = []

    def interrupted(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
        if len(written) == 2:
            path.write_bytes(b'half of it')
            raise KeyboardInterrupt
        written.append(path.name)
        real(content, member, path)

    real = coco_files._unpack_one
    monkeypatch.setattr(coco_files, '_unpack_one', interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch('coco_val', data=tmp_path)
    root = tmp_path / 'coco'
    assert not (root / 'val2017').exists() and (root / 'val2017.zip').exists()
    monkeypatch.setattr(coco_files, '_unpack_one', real)
    first = root / '.val2017.unpacking' / written[0]
    before = first.stat().st_mtime_ns
    fetch('coco_val', data=tmp_path)
    assert (root / 'val2017' / written[0]).stat().st_mtime_ns == before and len(server.asked) == 1
    assert [(root / 'val2017' / name).read_bytes() for name in NAMES['val']] == list(map(picture, NAMES['val']))
    assert tree(root) == sorted(f'val2017/{name}' for name in NAMES['val'])


def test_full_disk_is_said_before_anything_is_fetched(server, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    for name, known in TABLE.items():
        monkeypatch.setitem(ARCHIVES, name, replace(known, sources=ARCHIVES[name].sources))
    monkeypatch.setattr(sources.shutil, 'disk_usage', lambda path: usage._replace(free=30_000_000_000))
    message = r'coco_annotations, coco_val, coco_train \(.*\) needs 40\.0 GB of disk, 30\.0 GB are free'
    with pytest.raises(ConfigError, match=message) as error:
        fetch(*ARCHIVES, data=tmp_path)
    assert '\n' not in str(error.value) and server.asked == []
    with pytest.raises(ConfigError, match=r'needs 41\.1 GB'):
        fetch(*ARCHIVES, data=tmp_path, keep_archives=True)


def test_no_network(server, tmp_path) -> None:
    server.status = 503
    with pytest.raises(AssetError, match=r'no source gave the file: http.*HTTP 503.*by hand to .*val2017\.zip'):
        fetch('coco_val', data=tmp_path)
    assert tree(tmp_path) == []


def test_wrong_content_is_not_unpacked(server, tmp_path) -> None:
    path = '/zips/val2017.zip'
    server.files[path] = bytes(len(server.files[path]))
    with pytest.raises(AssetError, match='not the official file, its SHA-256 begins with'):
        fetch('coco_val', data=tmp_path)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda content: content[:-1], r'not the official archive, it has .* bytes, not .*; delete it'),
        (lambda content: bytes(len(content)), r'damaged archive \(.*\); delete it and run the same command again'),
        (lambda content: content.replace(picture('3')[30:60], bytes(30)), r'damaged archive \(Bad CRC-32 .*\); delete'),
    ],
    ids=['cut off', 'no archive', 'broken inside'],
)
def test_damaged_archive_by_hand(server, tmp_path, damage, message) -> None:
    path = tmp_path / 'coco' / 'val2017.zip'
    path.parent.mkdir()
    path.write_bytes(damage(server.files['/zips/val2017.zip']))
    with pytest.raises(AssetError, match=message) as error:
        fetch('coco_val', data=tmp_path)
    assert '\n' not in str(error.value) and not (tmp_path / 'coco' / 'val2017').exists()
    path.unlink()
    fetch('coco_val', data=tmp_path)
    found = [(tmp_path / 'coco' / 'val2017' / name).read_bytes() for name in NAMES['val']]
    assert found == list(map(picture, NAMES['val'])), 'nothing of the damaged one is left'


def test_annotations_without_the_wanted_split(server, tmp_path, monkeypatch) -> None:
    text = {'annotations/instances_val2017.json': annotations('val')}
    publish(monkeypatch, server, 'coco_annotations', archive(text))
    with pytest.raises(AssetError, match=r'trainval2017\.zip: holds 1 of 2 files of annotations/; delete it'):
        fetch('coco_annotations', data=tmp_path)


def test_folder_that_cannot_be_made(server, tmp_path) -> None:
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'cannot be written or read .*--data or PTQSAM_DATA'):
        fetch('coco_val', data=tmp_path / 'file')


def test_status(server, tmp_path) -> None:
    known, root = ARCHIVES['coco_val'], tmp_path / 'coco'
    assert known.status(tmp_path) == 'no'
    root.mkdir()
    (root / 'val2017.zip.part').write_bytes(b'xy')
    assert known.status(tmp_path) == 'no; archive not unpacked, 2 bytes'
    (root / 'val2017').mkdir()
    (root / 'val2017' / NAMES['val'][0]).write_bytes(b'')
    (root / 'val2017' / 'else.jpg').write_bytes(b'')
    assert known.status(tmp_path) == '1 of 4 images; archive not unpacked, 2 bytes'
    (root / 'val2017.zip.part').unlink()
    fetch('coco_val', data=tmp_path)
    assert known.status(tmp_path) == 'yes, 4 images'


def test_advice_names_the_command(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv('PTQSAM_DATA', str(tmp_path))
    here, other = tmp_path / 'coco', Path('/other/coco')
    assert fetch_advice(here / 'annotations/instances_val2017.json') == (
        'fetch it with `python tools/download.py coco_annotations`'
    )
    assert fetch_advice(here / 'val2017/000000000001.jpg') == (
        'fetch it with `python tools/download.py coco_val`, or with `coco --subset N` what --limit N evaluates'
    )
    assert fetch_advice(other / 'train2017/000000000001.jpg') == (
        'fetch it with `python tools/download.py coco_train --data /other`, or with `coco --subset 0 --data /other` '
        'what calibrates alone'
    )
    for path in ('scenes/annotations/instances_val.json', 'coco/annotations/instances_mine.json', 'coco/x/y.jpg'):
        assert fetch_advice(tmp_path / path) == ''
    assert fetch_advice('000000000001.jpg') == ''
