"""tools/download.py: the command line, interruption, exit codes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from mmengine.config import Config

from ptqsam.coco_files import ARCHIVES
from ptqsam.download import CHECKPOINTS, fetch_command
from tests.servers import MODEL as CONTENT
from tests.servers import MODEL_SHA256 as SHA256
from tests.servers import Server, serve_model
from tests.tiny import ROOT, accept_interrupts


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serve_model(monkeypatch) as state:
        yield state


CLI = f"""
import runpy, sys
from ptqsam import download as d
url, root = sys.argv[1:3]
d.CHECKPOINTS['model'] = d.Checkpoint('model', 'model.pth', (d.Url(url),), {SHA256!r}, 'MIT', 'a test', {len(CONTENT)})
sys.argv = ['tools/download.py', 'model', '--root', root]
runpy.run_path('tools/download.py', run_name='__main__')
"""


def _tool(*args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    command = [sys.executable, 'tools/download.py', *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def test_ctrl_c_leaves_a_part_that_can_be_resumed(server, tmp_path) -> None:
    command = [sys.executable, '-c', CLI, server.url, str(tmp_path)]
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    server.hang_after = 600_000
    options = dict(stderr=subprocess.PIPE, text=True, preexec_fn=accept_interrupts)
    with subprocess.Popen(command, cwd=ROOT, env=environment, **options) as process:
        assert server.stalled.wait(30)
        part = tmp_path / 'model.pth.part'
        for _ in range(1000):  # until bytes have arrived at the other side
            if part.exists() and part.stat().st_size:
                break
            threading.Event().wait(0.01)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert 'Traceback' not in stderr and stderr.splitlines()[-1].startswith('interrupted')
    assert os.listdir(tmp_path) == ['model.pth.part']
    got = part.stat().st_size
    assert 0 < got <= 600_000 and part.read_bytes() == CONTENT[:got]
    server.hang_after = None
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / 'model.pth')
    assert (tmp_path / 'model.pth').read_bytes() == CONTENT
    assert server.asked[-1][1] == f'bytes={got}-'


def test_command_line_exit_codes(server, tmp_path) -> None:
    done = _tool('sam_vit_b', 'mobile-sam')
    assert done.returncode == 2 and "did you mean 'mobile_sam'" in done.stderr and 'Traceback' not in done.stderr
    assert _tool().returncode == 2
    (tmp_path / 'mobile_sam.pt').write_bytes(b'cut off')
    done = _tool('mobile_sam', '--root', str(tmp_path))
    assert done.returncode == 3 and done.stderr.count('\n') == 1 and 'it has 7 bytes' in done.stderr
    done = _tool('--list', '--root', str(tmp_path), '--data', str(tmp_path))
    assert done.returncode == 0
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[1:]}
    assert set(rows) == {*CHECKPOINTS, *ARCHIVES, 'folder'}
    assert rows['sam_vit_b'].split()[2] == 'no' and 'it has 7 bytes' in rows['mobile_sam']
    assert rows['coco_val'].split()[1:3] == ['815,585,330', 'no']


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['coco-val'], "did you mean 'coco_val'"),
        (['coco', '--root', 'x'], '--root is for checkpoints; the folder for coco/ is --data'),
        (['sam_vit_b', '--subset', '3'], '--subset goes with the name coco'),
        (['coco', '--subset', '-1'], "'-1' must be a whole number"),
        (['coco', '--subset', '1.5'], "'1.5' must be a whole number"),
        ([], 'name at least one checkpoint or coco'),
    ],
)
def test_bad_usage_is_one_line(words, message) -> None:
    done = _tool(*words)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and done.stdout == ''


def test_command_that_fetches_a_file(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path))
    assert fetch_command(tmp_path / 'mobile_sam.pt') == 'python tools/download.py mobile_sam'
    assert fetch_command('/else/mobile_sam.pt') == 'python tools/download.py mobile_sam --root /else'
    assert fetch_command(tmp_path / 'mine.pth') == ''


def test_every_config_names_files_that_can_be_fetched(monkeypatch) -> None:
    monkeypatch.setenv('PTQSAM_CKPT', 'ckpt')
    for path in sorted(ROOT.glob('configs/[!_]*/*')):
        model = Config.fromfile(path).model
        for checkpoint in (model.sam.checkpoint, model.get('detector_checkpoint')):
            # the one without an official source, see README.md
            if checkpoint not in (None, 'ckpt/yolox_nano_mmdet.pth'):
                assert fetch_command(checkpoint), f'{path}: {checkpoint}'
