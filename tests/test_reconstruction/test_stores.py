"""What keeps cached activations: pieces of memory, a file without a name; and where there is room."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ptqsam.errors import ConfigError
from ptqsam.reconstruction import cache as module
from ptqsam.reconstruction.cache import ActivationCache, choose_store
from ptqsam.reconstruction.stores import MemoryKeeper, free_host_memory
from tests.tiny import ROOT


def test_disk_space_is_given_back(tmp_path):
    cache = ActivationCache('disk', 'cpu', folder=tmp_path)
    cache.append([torch.randn(1 << 10)])
    old = os.fstat(cache._keeper._file.fileno())
    assert (old.st_nlink, old.st_size) == (0, 4096)
    cache.clear()
    assert cache._keeper._file.closed


def test_nothing_is_left_of_a_killed_process(tmp_path):
    code = (
        'import os, signal, sys, torch\n'
        'from ptqsam.reconstruction.cache import ActivationCache\n'
        "cache = ActivationCache('disk', 'cpu', folder=sys.argv[1])\n"
        'cache.append([torch.randn(1000)])\n'
        'os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code, str(tmp_path / 'cache')], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / 'cache').iterdir()) == []


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    cache = ActivationCache('disk', 'cpu', folder=tmp_path)
    first = torch.randn(5000)
    cache.append([first])
    write = os.pwrite

    def half(handle, payload, offset):
        if len(payload) <= 10_000:
            raise OSError(errno.ENOSPC, 'No space left on device')
        return write(handle, payload[: len(payload) // 2], offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, 'pwrite', half)
        with pytest.raises(ConfigError, match='No space left'):
            cache.append([torch.randn(5000)])
    assert os.fstat(cache._keeper._file.fileno()).st_size == 20_000
    second = torch.randn(700)
    cache.append([second])
    assert torch.equal(cache.get(0)[0], first)
    assert torch.equal(cache.get(1)[0], second)


def test_pinned_tensors_share_pieces(monkeypatch):
    monkeypatch.setattr(MemoryKeeper, '_allocate', lambda self, size: torch.empty(size, dtype=torch.uint8))
    memory = MemoryKeeper(torch.device('cpu'), pin=True, arena=1024)
    values = [torch.randn(size) for size in (3, 0, 100, 7, 300, 5)] + [
        torch.tensor(2.5),
        torch.arange(9),
        torch.ones(2).bool(),
    ]
    loads = [memory.put(value) for value in values]
    assert all(torch.equal(load(), value) for load, value in zip(loads, values, strict=True))
    pieces = {
        load().untyped_storage().data_ptr(): load().untyped_storage().nbytes() for load in loads if load().numel()
    }
    assert list(pieces.values()) == [1024, 8192]


def test_choose_store(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'free_host_memory', lambda: 1000)
    monkeypatch.setattr(module, 'free_device_memory', lambda device: 500)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda folder: type('Usage', (), {'free': 5000}))
    folder = tmp_path / 'not' / 'yet'
    assert [choose_store(size, 'cuda', folder=folder) for size in (300, 301, 600, 601)] == [
        'device',
        'host',
        'host',
        'disk',
    ]
    assert [choose_store(size, 'cpu') for size in (300, 600, 601, 5000)] == ['host', 'host', 'disk', 'disk']
    assert [choose_store(size, 'cuda', limit=200) for size in (200, 201)] == ['device', 'disk']
    assert [choose_store(size, 'cpu', limit=9999) for size in (1000, 1001)] == ['host', 'disk']
    with pytest.raises(ConfigError) as caught:
        choose_store(5001, 'cpu')
    assert 'reconstruction.cache.dtype=bfloat16' in str(caught.value)


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_free_host_memory(tmp_path):
    write_tree(tmp_path, {'proc/meminfo': 'MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 4000 kB\n'})
    assert free_host_memory(tmp_path) == 4000 * 1024
    # version 2: nested groups, the outer one is tighter
    write_tree(
        tmp_path,
        {
            'proc/self/cgroup': '0::/jobs/mine\n',
            'sys/fs/cgroup/jobs/mine/memory.max': 'max\n',
            'sys/fs/cgroup/jobs/mine/memory.current': '10\n',
            'sys/fs/cgroup/jobs/memory.max': '1000\n',
            'sys/fs/cgroup/jobs/memory.current': '700\n',
            'sys/fs/cgroup/jobs/memory.stat': 'anon 5\ninactive_file 150\n',
        },
    )
    assert free_host_memory(tmp_path) == 450
    # version 1 in a container: the path is one of the host
    write_tree(
        tmp_path,
        {
            'proc/self/cgroup': '5:cpu:/x\n4:memory,extra:/docker/x\n0::/none\n',
            'sys/fs/cgroup/memory/memory.limit_in_bytes': '3000\n',
            'sys/fs/cgroup/memory/memory.usage_in_bytes': '2999\n',
            'sys/fs/cgroup/memory/memory.stat': 'inactive_file 1\ntotal_inactive_file 7\n',
        },
    )
    assert free_host_memory(tmp_path) == 8
    assert free_host_memory() > 0
