"""Work of several runs: computed once, exact, and never the end of a run."""

import errno
import multiprocessing
import sys
import time

import pytest
import torch

from ptqsam.errors import ConfigError
from ptqsam.shared_work import (
    SharedWork,
    folder_bytes,
    gb_from_environment,
    hash_tensors,
    load_plain,
    load_tensors,
    save_plain,
    save_tensors,
)


def work_beside(folder, log, gate):
    """Compute something for others, until the gate is there; what is said and found comes into the log."""
    with open(log, 'w', buffering=1) as sys.stderr:

        def compute():
            print('computing', file=sys.stderr)
            while not gate.exists():
                time.sleep(0.02)
            return dict(value=1.5)

        work = SharedWork(folder)
        found = work.compute_once('fp', 'a.json', compute, load_plain, save_plain)
        print(found, work.taken, file=sys.stderr)


@pytest.fixture
def start(tmp_path):
    """Starts processes that want the same; returns process and log."""
    started = []

    def start_one():
        log = tmp_path / f'log{len(started)}'
        args = tmp_path / 'cache', log, tmp_path / 'gate'
        # forked, since importing torch takes seconds
        process = multiprocessing.get_context('fork').Process(target=work_beside, args=args)
        process.start()
        started.append(process)
        return process, log

    yield start_one
    for process in started:
        process.kill()


def wait_for(log, text):
    deadline = time.monotonic() + 60
    while not log.exists() or text not in log.read_text():
        assert time.monotonic() < deadline, f'{text!r} did not come'
        time.sleep(0.02)


def compute_once(work, value, name='a.json', kind='fp'):
    return work.compute_once(kind, name, lambda: dict(value=value), load_plain, save_plain)


def refuse():
    raise AssertionError('computed again')


def test_processes_at_once_compute_once(start, tmp_path):
    first, log = start()
    wait_for(log, 'computing')
    others = [start() for _ in range(2)]
    for _, other in others:
        wait_for(other, 'waiting')
    (tmp_path / 'gate').touch()
    for process, _ in ((first, log), *others):
        process.join(60)
        assert process.exitcode == 0
    assert log.read_text() == "computing\n{'value': 1.5} []\n"
    waited = f"{tmp_path}/cache/fp/a.json: waiting for another run\n{{'value': 1.5}} ['fp']\n"
    assert [other.read_text() for _, other in others] == [waited] * 2
    assert [path.name for path in (tmp_path / 'cache/fp').iterdir()] == ['a.json'], 'no lock file is left'


def test_a_killed_process_leaves_the_work_to_the_next(start, tmp_path):
    first, log = start()
    wait_for(log, 'computing')
    second, other = start()
    wait_for(other, 'waiting')
    first.kill()
    wait_for(other, 'computing')
    (tmp_path / 'gate').touch()
    second.join(60)
    assert other.read_text().endswith(": waiting for another run\ncomputing\n{'value': 1.5} []\n")
    assert log.read_text() == 'computing\n'


def test_what_a_kill_left_half_written_goes(tmp_path):
    (tmp_path / 'fp').mkdir()
    (tmp_path / 'fp/.a.x8q2.json').write_text('{"value"')
    (tmp_path / 'fp/.b.x8q2.json').write_text('of another')
    compute_once(SharedWork(tmp_path), 1)
    assert {path.name for path in (tmp_path / 'fp').iterdir()} == {'a.json', '.b.x8q2.json'}


@pytest.mark.parametrize('damage', [lambda text: text[:10], lambda text: text.replace('2', '3', 1), lambda text: '[]'])
def test_a_damaged_file_is_said_and_computed_again(damage, tmp_path, capfd):
    compute_once(SharedWork(tmp_path), 2)
    path = tmp_path / 'fp/a.json'
    path.write_text(damage(path.read_text()))
    work = SharedWork(tmp_path)
    assert compute_once(work, 4) == dict(value=4) and work.taken == []
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f'{path}: cannot be read (') and line.endswith('); computing it again')
    assert SharedWork(tmp_path).compute_once('fp', 'a.json', refuse, load_plain, save_plain) == dict(value=4)


def test_a_file_that_holds_too_little_is_replaced(tmp_path, capfd):
    def load(path):
        content = load_plain(path)
        return content if 'masks' in content else None

    compute_once(SharedWork(tmp_path), 1)
    more = dict(value=1, masks=[])
    assert SharedWork(tmp_path).compute_once('fp', 'a.json', lambda: more, load, save_plain) == more
    assert SharedWork(tmp_path).compute_once('fp', 'a.json', refuse, load, save_plain) == more
    assert capfd.readouterr().err == ''


def test_a_folder_that_cannot_be_written_is_said_once(tmp_path, capfd):
    (tmp_path / 'file').touch()
    work = SharedWork(tmp_path / 'file')
    assert [compute_once(work, number, f'{number}.json')['value'] for number in range(3)] == [0, 1, 2]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f'{tmp_path}/file: cannot keep work for other runs here (')


def test_a_full_disk_is_said_once_and_leaves_nothing(tmp_path, capfd):
    def save(path, value):
        path.write_text('half')
        raise OSError(errno.ENOSPC, 'No space left on device')

    work = SharedWork(tmp_path)
    for number in range(3):
        assert work.compute_once('fp', f'{number}.json', lambda: 1.5, load_plain, save) == 1.5
    assert capfd.readouterr().err.count('No space left on device') == 1
    assert list((tmp_path / 'fp').iterdir()) == []


def test_an_error_of_the_work_itself_is_the_callers(tmp_path):
    def fail():
        raise RuntimeError('no')

    with pytest.raises(RuntimeError, match='no'):
        SharedWork(tmp_path).compute_once('fp', 'a.json', fail, load_plain, save_plain)
    assert list((tmp_path / 'fp').iterdir()) == []
    assert compute_once(SharedWork(tmp_path), 3) == dict(value=3)


def test_large_kinds_have_a_limit(tmp_path, capfd):
    work = SharedWork(tmp_path, max_gb=9e-6)
    content = dict(x=torch.zeros(1000)), None
    for number in range(5):
        work.compute_once('embeddings', f'{number}.safetensors', lambda: content, load_tensors, save_tensors)
    assert {path.name for path in (tmp_path / 'embeddings').iterdir()} == {'0.safetensors', '1.safetensors'}
    assert folder_bytes(tmp_path / 'embeddings') <= 9000
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f'{tmp_path}/embeddings: has 9e-06 GB (PTQSAM_SHARED_GB), no more embeddings are kept'
    # what is there is still taken, and small kinds go on
    work.compute_once('embeddings', '1.safetensors', refuse, load_tensors, save_tensors)
    compute_once(work, 1)
    assert work.taken == ['embeddings'] and (tmp_path / 'fp/a.json').is_file()


def test_limit_from_the_environment(monkeypatch):
    for text, limit in (('', 10), ('0', 0), ('2.5', 2.5)):
        monkeypatch.setenv('PTQSAM_SHARED_GB', text)
        assert gb_from_environment() == limit
    for text in ('many', '-1', 'nan', 'inf'):
        monkeypatch.setenv('PTQSAM_SHARED_GB', text)
        with pytest.raises(ConfigError, match=f"PTQSAM_SHARED_GB='{text}' must be a number of GB"):
            SharedWork('/')


def test_tensors_come_back_as_they_were(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 6, 4, 5, generator=generator)
    tensors = dict(
        z=x,
        channels_last=x.to(memory_format=torch.channels_last),
        transposed=torch.randn(7, 3, generator=generator).t(),
        nan=torch.tensor([torch.nan, torch.inf, -0.0, 1e-45]),
        number=torch.tensor(3.5, dtype=torch.float64),
        none=torch.empty(0, 3, dtype=torch.int32),
        flags=torch.tensor([True, False]),
        view=x,
    )
    save_tensors(tmp_path / 'x.safetensors', (tensors, dict(numbers=[1, 0.1, None])))
    found, plain = load_tensors(tmp_path / 'x.safetensors')
    assert plain == dict(numbers=[1, 0.1, None]) and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert found[name].stride() == tensor.stride() and found[name].data_ptr() % 64 == 0
        assert hash_tensors({'': found[name]}) == hash_tensors({'': tensor})
    assert 1 / found['nan'][2] == -torch.inf


def test_a_changed_byte_is_found(tmp_path):
    path = tmp_path / 'x.safetensors'
    save_tensors(path, (dict(x=torch.ones(100)), None))
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='checksum differs'):
        load_tensors(path)


def test_hashes_tell_tensors_apart():
    x = torch.arange(6.0)
    others = [x.view(2, 3), x.double(), -x, x.int()]
    assert len({hash_tensors(dict(x=tensor)) for tensor in (x, *others)}) == 5
    assert hash_tensors(dict(x=x)) != hash_tensors(dict(y=x))
    assert hash_tensors(dict(x=x)) == hash_tensors(dict(x=torch.stack([x, x], 1)[:, 0]))
