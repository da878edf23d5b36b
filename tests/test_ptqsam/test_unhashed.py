"""Fetching a file whose publisher states no hash: never a mixture of two files, and no record of a damaged one."""

import hashlib
import io
import json
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from ptqsam import sources
from ptqsam.download import CHECKPOINTS, Checkpoint, fetch
from ptqsam.errors import AssetError
from ptqsam.sources import Url
from ptqsam.unhashed import LEGACY_START, damage
from tests.servers import Server, closed_port, serve

BOTH = ('ETag', 'Last-Modified')


def saved(value: int, **options: bool) -> bytes:
    """A file of torch; those of two values differ in one byte in four, and in nothing else that matters."""
    buffer = io.BytesIO()
    torch.save({'weight': torch.full((5000,), value, dtype=torch.int32)}, buffer, **options)
    return buffer.getvalue()


FILE, OTHER = saved(1), saved(2)
LEGACY = saved(1, _use_new_zipfile_serialization=False)
SHA256 = hashlib.sha256(FILE).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve(monkeypatch, {'/one': FILE, '/two': OTHER}) as state:
        yield state


@pytest.fixture
def model(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    """Put a checkpoint 'model' without hash and size into the table, with these sources of the server."""

    def _add(*paths: str) -> Checkpoint:
        urls = tuple(Url(path if '://' in path else server.url + path) for path in paths)
        monkeypatch.setitem(CHECKPOINTS, 'model', Checkpoint('model', 'model.pth', urls, '', 'MIT', 'a test'))
        return CHECKPOINTS['model']

    return _add


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def break_off(server: Server, root: Path, got: int, then: int = 0) -> str:
    """Fetch the first bytes from a server that then sends no more, or so many each time; returns what is said."""
    server.cuts = [got] + [then] * 50
    with pytest.raises(AssetError) as error:
        fetch('model', root)
    server.cuts = []
    server.asked.clear()
    server.conditions.clear()
    return str(error.value)


def test_a_source_never_goes_on_with_the_part_of_another(server, model, tmp_path) -> None:
    model('/one', '/two')
    server.cuts = [1000] + [0] * 5
    assert fetch('model', tmp_path).read_bytes() == OTHER
    assert server.asked[-1] == ('/two', None) and files(tmp_path) == ['model.pth', 'model.pth.sha256']


def test_a_source_that_gives_nothing_costs_nothing_of_the_part_of_another(server, model, tmp_path, monkeypatch) -> None:
    opened, dead = [], f'http://127.0.0.1:{closed_port()}/two'
    model('/one', dead, '/absent')
    known = sources._open
    monkeypatch.setattr(sources, '_open', lambda url, *rest: opened.append(url) or known(url, *rest))
    assert '1,000 bytes are kept in model.pth.part' in break_off(server, tmp_path, 1000)
    assert opened.count(dead) == 1, 'a dead server is left at once'
    assert files(tmp_path) == ['model.pth.part', 'model.pth.part.version']
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert server.asked == [('/one', 'bytes=1000-')] and files(tmp_path) == ['model.pth', 'model.pth.sha256']


@pytest.mark.parametrize('tags', [BOTH, BOTH[:1], BOTH[1:]])
def test_the_same_file_goes_on_after_a_broken_connection(tags, server, model, tmp_path) -> None:
    model('/one')
    server.tags, server.cuts = tags, [1000, 500]
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert [asked[1] for asked in server.asked] == [None, 'bytes=1000-', 'bytes=1500-']
    tag = server.tags_of(FILE)[tags[0]]
    assert server.conditions == [None, tag, tag]


@pytest.mark.parametrize('conditional', [True, False], ids=['minds If-Range', 'does not'])
@pytest.mark.parametrize('tags', [BOTH, BOTH[:1], BOTH[1:]])
@pytest.mark.parametrize('other', [OTHER, OTHER + bytes(9), OTHER[:500]], ids=['as long', 'longer', 'shorter'])
def test_a_file_that_has_changed_is_begun_again(other, tags, conditional, server, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('ptqsam.download.damage', lambda path: None)  # which would find the mixture, too
    model('/one')
    server.tags, server.conditional = tags, conditional
    break_off(server, tmp_path, 1000)
    server.files['/one'] = other
    assert fetch('model', tmp_path).read_bytes() == other
    assert server.asked[0][1] == 'bytes=1000-'


def test_an_answer_of_another_length_is_of_another_file(server, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('ptqsam.download.damage', lambda path: None)
    model('/one')
    break_off(server, tmp_path, 1000)
    server.files['/one'] = FILE + b'more'
    monkeypatch.setattr(server, 'tags_of', lambda content: {'ETag': f'"{SHA256[:16]}"'})
    assert fetch('model', tmp_path).read_bytes() == FILE + b'more'
    assert [asked[1] for asked in server.asked] == ['bytes=1000-', None]


@pytest.mark.parametrize(('tags', 'weak'), [((), False), (('ETag',), True)], ids=['no tag', 'weak tag'])
def test_a_server_that_tells_no_versions_starts_over(tags, weak, server, model, tmp_path) -> None:
    model('/one')
    server.tags, server.weak = tags, weak
    server.cuts = [1000]
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert [asked[1] for asked in server.asked] == [None, None]
    (tmp_path / 'model.pth').unlink()
    assert 'kept' not in break_off(server, tmp_path, 1000, then=900)
    assert files(tmp_path) == ['model.pth.sha256'], 'nothing could go on with the part'


def test_a_weak_tag_leaves_the_date(server, model, tmp_path) -> None:
    model('/one')
    server.weak, server.cuts = True, [1000]
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert server.conditions == [None, server.tags_of(FILE)['Last-Modified']]


@pytest.mark.parametrize('note', [None, b'', b'{', b'[]', b'{"url": 1}', b'\xff'])
@pytest.mark.parametrize('part', [b'Z' * 500, FILE, b'Z' * (len(FILE) + 1)], ids=['short', 'whole', 'long'])
def test_a_part_of_unknown_version_is_begun_again(part, note, server, model, tmp_path) -> None:
    model('/one')
    (tmp_path / 'model.pth.part').write_bytes(part)
    if note is not None:
        (tmp_path / 'model.pth.part.version').write_bytes(note)
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert server.asked == [('/one', None)] and files(tmp_path) == ['model.pth', 'model.pth.sha256']


def test_a_whole_part_needs_no_second_transfer(server, model, tmp_path) -> None:
    url = str(model('/one').sources[0])
    (tmp_path / 'model.pth.part').write_bytes(FILE)
    note = dict(url=url, tag='"x"', total=len(FILE))
    (tmp_path / 'model.pth.part.version').write_text(json.dumps(note))
    assert fetch('model', tmp_path).read_bytes() == FILE and server.asked == []
    assert files(tmp_path) == ['model.pth', 'model.pth.sha256']


def test_a_part_as_long_as_a_changed_file_is_not_that_file(server, model, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr('ptqsam.download.damage', lambda path: None)
    url = str(model('/one').sources[0])
    server.conditional = False
    (tmp_path / 'model.pth.part').write_bytes(b'Z' * len(FILE))
    note = dict(url=url, tag='"x"', total=len(FILE) + 5)
    (tmp_path / 'model.pth.part.version').write_text(json.dumps(note))
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert [asked[1] for asked in server.asked] == [f'bytes={len(FILE)}-', None]


def test_a_hash_makes_all_this_needless(server, monkeypatch, tmp_path) -> None:
    """Any beginning may be gone on with, from any source: what is wrong shows in the end."""
    urls = (Url(f'{server.url}/absent'), Url(f'{server.url}/one'))
    monkeypatch.setitem(CHECKPOINTS, 'model', Checkpoint('model', 'model.pth', urls, SHA256, 'MIT', 'a test'))
    (tmp_path / 'model.pth.part').write_bytes(FILE[:1000])
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert server.asked == [('/absent', 'bytes=1000-'), ('/one', 'bytes=1000-')]
    assert server.conditions == [None] and files(tmp_path) == ['model.pth']


# --- the record


def flipped(content: bytes) -> bytes:
    """With another byte among the numbers."""
    place = content.index(b'\1\0\0\0' * 100) + 200
    return content[:place] + b'\7' + content[place + 1 :]


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr(name, b'x')
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('content', 'problem'),
    [
        (flipped(FILE), 'it is damaged in archive/data/0'),
        (FILE[:-300], 'it is truncated or damaged ('),
        (FILE[:10000] + OTHER[10000:], 'it is damaged in archive/data/0'),
        (zipped('model/readme.txt'), 'it is no file of torch but another zip file'),
        (LEGACY[:100], 'its head cannot be read ('),
        (b'{"message": "quota exceeded"}', 'it is no file of torch'),
        (b'', 'it is no file of torch'),
    ],
)
def test_a_damaged_file_is_neither_kept_nor_recorded(content, problem, server, model, tmp_path) -> None:
    checkpoint = model('/one')
    server.files['/one'] = content or b'x'
    with pytest.raises(AssetError) as error:
        fetch('model', tmp_path)
    assert f'not the official file, {problem if content else ""}' in str(error.value) and '\n' not in str(error.value)
    assert files(tmp_path) == []

    # nor is one that was put there by hand, which stays
    (tmp_path / 'model.pth').write_bytes(content)
    with pytest.raises(AssetError) as error:
        fetch('model', tmp_path, verify=True)
    assert f'not the official model, {problem}' in str(error.value)
    assert checkpoint.status(tmp_path, verify=True).startswith(problem) and files(tmp_path) == ['model.pth']


def test_the_next_source_may_have_a_sound_one(server, model, tmp_path) -> None:
    model('/one', '/two')
    server.files['/one'] = flipped(FILE)
    assert fetch('model', tmp_path).read_bytes() == OTHER


def test_a_damaged_part_is_fetched_once_more(server, model, tmp_path) -> None:
    model('/one')
    break_off(server, tmp_path, 15000)
    (tmp_path / 'model.pth.part').write_bytes(b'?' * 15000)
    assert fetch('model', tmp_path).read_bytes() == FILE
    assert [asked[1] for asked in server.asked] == ['bytes=15000-', None]


def test_an_old_file_is_recorded_as_unchecked(server, model, tmp_path, capfd) -> None:
    checkpoint = model('/one')
    server.files['/one'] = LEGACY
    assert LEGACY.startswith(LEGACY_START) and damage(fetch('model', tmp_path)) is None
    assert checkpoint.recorded(tmp_path) == hashlib.sha256(LEGACY).hexdigest()
    assert 'the file itself, of an old format, could not be checked' in capfd.readouterr().err


def test_first_hash_is_recorded_and_compared(server, model, tmp_path, capfd) -> None:
    checkpoint = model('/one')
    path = fetch('model', tmp_path)
    said = capfd.readouterr().err
    assert f'SHA-256 {SHA256} is kept in model.pth.sha256' in said and 'could not be checked' not in said
    assert checkpoint.status(tmp_path) == 'yes, hash as first downloaded'
    check = subprocess.run(['sha256sum', '--check', 'model.pth.sha256'], cwd=tmp_path, capture_output=True)
    assert check.returncode == 0
    assert fetch('model', tmp_path, verify=True) == path
    path.write_bytes(b'x')
    assert fetch('model', tmp_path) == path, 'nothing is read without --verify'
    with pytest.raises(AssetError, match=rf'not {SHA256[:8]} as model\.pth\.sha256 has it since the first download'):
        fetch('model', tmp_path, verify=True)
    assert checkpoint.status(tmp_path, verify=True).startswith('its SHA-256 begins with')


def test_second_download_must_be_the_same_file(server, model, tmp_path) -> None:
    model('/one')
    fetch('model', tmp_path).unlink()
    server.files['/one'] = OTHER
    with pytest.raises(AssetError, match=r'since the first download; what came was deleted'):
        fetch('model', tmp_path)
    assert files(tmp_path) == ['model.pth.sha256']
    (tmp_path / 'model.pth.sha256').unlink()
    assert fetch('model', tmp_path).read_bytes() == OTHER


def test_file_by_hand_gets_its_record_when_it_is_verified(model, tmp_path) -> None:
    checkpoint = model('/one')
    assert not checkpoint.recorded(tmp_path)
    (tmp_path / 'model.pth').write_bytes(FILE)
    fetch('model', tmp_path)
    assert checkpoint.status(tmp_path) == 'yes, its hash is not known'
    fetch('model', tmp_path, verify=True)
    assert checkpoint.recorded(tmp_path) == SHA256
    assert checkpoint.status(tmp_path) == 'yes, hash as first downloaded'


@pytest.mark.parametrize('content', [b'', b'no hash', b'\xff\xfe'])
def test_damaged_record_is_no_record(content, model, tmp_path) -> None:
    checkpoint = model('/one')
    (tmp_path / 'model.pth.sha256').write_bytes(content)
    assert checkpoint.recorded(tmp_path) == ''
