"""Checkpoints of every kind that people hand over: good, old, odd, broken, hostile."""

import argparse
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from ptqsam import weights
from ptqsam.errors import AssetError
from ptqsam.weights import load_weights, read_checkpoint
from tests.tiny import ROOT

HOSTILE_FILE_WAS_EXECUTED = 'executed'


@pytest.fixture
def state() -> OrderedDict:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)).state_dict()


def _same(left: dict, right: dict) -> bool:
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


def _refusal(path: Path) -> str:
    with pytest.raises(AssetError) as error:
        load_weights(path)
    text = str(error.value)
    assert '\n' not in text and text.startswith(f'{path}: ')
    return text


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
@pytest.mark.parametrize('wrap', [None, 'state_dict', 'model'])
def test_reads_and_unwraps(state, tmp_path, zipped, wrap) -> None:
    path = tmp_path / 'a.pth'
    content = {wrap: state, 'epoch': 3, 'optimizer': {'lr': 0.1}} if wrap else state
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = load_weights(path)
    assert _same(loaded, state)
    assert loaded._metadata == state._metadata, 'modules decide by it which old names they rename'


def test_compressed_archive_is_read_right(state, tmp_path) -> None:
    torch.save(state, tmp_path / 'stored.pth')
    with zipfile.ZipFile(tmp_path / 'stored.pth') as old:
        with zipfile.ZipFile(tmp_path / 'packed.pth', 'w', zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    assert _same(load_weights(tmp_path / 'packed.pth'), state)


def test_safetensors_whatever_its_suffix(state, tmp_path) -> None:
    for name in ('a.safetensors', 'a.pth'):
        safetensors.torch.save_file(dict(state), tmp_path / name)
        loaded = load_weights(tmp_path / name)
        assert set(loaded) == set(state) and all(torch.equal(loaded[key], state[key]) for key in state)


def _openmmlab_checkpoint(state: OrderedDict) -> dict:
    history = HistoryBuffer([1.0, 0.5], [1, 1])
    scalars = {'map': np.float64(0.384), 'lr': np.float32(0.02), 'iter': np.int64(7), 'best': np.array([1.0, 2.0])}
    log = {'train/loss': history, **scalars}
    meta = {'epoch': 12, 'CLASSES': ('person', 'car'), 'message': scalars}
    return {'meta': meta, 'message_hub': {'log_scalars': log}, 'state_dict': state}


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_openmmlab_checkpoint_with_logs(state, tmp_path, zipped) -> None:
    path = tmp_path / 'a.pth'
    torch.save(_openmmlab_checkpoint(state), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(pickle.UnpicklingError):  # the reason why an allow-list is needed
        torch.load(path, weights_only=True)
    before = set(torch.serialization.get_safe_globals())
    assert _same(load_weights(path), state)
    assert set(torch.serialization.get_safe_globals()) == before, 'the allow-list does not outlive the call'


def test_openmmlab_checkpoint_written_under_numpy_1(state, tmp_path) -> None:
    path = tmp_path / 'a.pth'
    torch.save(_openmmlab_checkpoint(state), path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in entries if name.endswith('data.pkl')]
    old = entries[name].replace(b'cnumpy._core.', b'cnumpy.core.')
    assert np.__version__.startswith('1.') or old != entries[name]
    with zipfile.ZipFile(path, 'w') as archive:
        for entry, data in {**entries, name: old}.items():
            archive.writestr(entry, data)
    assert _same(load_weights(path), state)


class _Hostile:
    """Unpickled by an ordinary reader, it makes a file named after what happened."""

    def __init__(self, folder: Path) -> None:
        self.command = f'touch {folder / HOSTILE_FILE_WAS_EXECUTED}'

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


class _Getattr:
    """Reaches for a method through the one builtin that pickled logs need."""

    def __reduce__(self) -> tuple:
        return getattr, (OrderedDict, 'fromkeys')


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_hostile_checkpoint_is_named_and_not_executed(state, tmp_path, zipped) -> None:
    path = tmp_path / 'sam_vit_b_01ec64.pth'
    torch.save({'state_dict': state, 'meta': _Hostile(tmp_path)}, path, _use_new_zipfile_serialization=zipped)
    text = _refusal(path)
    assert f"'{os.system.__module__}.system'" in text and 'it was not executed' in text
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_hostile_plain_pickle_is_named_and_not_executed(tmp_path, protocol) -> None:
    path = tmp_path / 'a.pth'
    # the strings before it make newer protocols refer to the module and the name by their memo
    words = {os.system.__module__: os.system.__qualname__, 'a': 'text'}
    path.write_bytes(pickle.dumps({**words, 'b': [_Hostile(tmp_path)]}, protocol=protocol))
    text = _refusal(path)
    assert f"'{os.system.__module__}.system'" in text and 'it was not executed' in text
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_hostile_files_would_work_elsewhere(tmp_path) -> None:
    """The tests above prove something only if the payload is live."""
    pickle.loads(pickle.dumps(_Hostile(tmp_path)))
    assert (tmp_path / HOSTILE_FILE_WAS_EXECUTED).exists()


def test_getattr_is_allowed_for_logs_only(state, tmp_path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({'state_dict': state, 'meta': _Getattr()}, path)
    assert "'builtins.getattr'" in _refusal(path)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
def test_options_of_a_training_script(state, tmp_path, zipped) -> None:
    path = tmp_path / 'a.pth'
    args = argparse.Namespace(lr=2e-4, stages=[1, 2], device=torch.device('cpu'), inner=argparse.Namespace(a=None))
    torch.save({'model': state, 'epoch': 35, 'args': args}, path, _use_new_zipfile_serialization=zipped)
    assert _same(load_weights(path), state)
    kept = read_checkpoint(path)['args']
    assert type(kept) is not argparse.Namespace and not vars(kept), 'nothing of it is kept'


@pytest.mark.parametrize('foreign', [_Hostile(Path('nowhere')), Path('a'), _Getattr()], ids=['code', 'path', 'getattr'])
def test_options_with_foreign_objects(state, tmp_path, foreign) -> None:
    args = argparse.Namespace(lr=1, output_dir=argparse.Namespace(inner=[foreign]))
    torch.save({'model': state, 'args': args}, tmp_path / 'a.pth')
    assert 'it was not executed' in _refusal(tmp_path / 'a.pth')


def test_stand_ins_do_not_pass_for_tensors(state, tmp_path) -> None:
    path = tmp_path / 'a.pth'
    torch.save({**state, 'gain': np.ones(3)}, path)
    assert "entry 'gain' of the state dict is no tensor" in _refusal(path)


@pytest.mark.parametrize('zipped', [True, False], ids=['zip', 'before torch 1.6'])
@pytest.mark.parametrize('keep', [60, 0.5, -1], ids=['head', 'half', 'last byte gone'])
def test_truncated(tmp_path, zipped, keep) -> None:
    buffer = io.BytesIO()
    torch.save({'a': torch.zeros(5000)}, buffer, _use_new_zipfile_serialization=zipped)
    whole = buffer.getvalue()
    cut = whole[: keep if isinstance(keep, int) else int(len(whole) * keep)]
    path = tmp_path / 'sam_vit_b_01ec64.pth'
    path.write_bytes(cut)
    text = _refusal(path)
    assert f'truncated, damaged or no checkpoint ({len(cut):,} of 375,042,383 bytes)' in text
    assert f'delete it and run `python tools/download.py sam_vit_b --root {tmp_path}`' in text


def test_truncated_safetensors(state, tmp_path) -> None:
    path = tmp_path / 'a.safetensors'
    safetensors.torch.save_file(dict(state), path)
    path.write_bytes(path.read_bytes()[:-20])
    assert 'truncated or damaged safetensors file' in _refusal(path)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'empty file'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:6dbb\nsize 40728226\n', 'a Git LFS pointer'),
        (b'\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>', 'a web page'),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', 'a web page'),
        (b'just a text\n', 'not a checkpoint'),
        (json.dumps({'a': 1}).encode(), 'not a checkpoint'),
        (bytes(range(255, -1, -1)) * 9, 'not a checkpoint'),
        (pickle.dumps({'a': 1}, protocol=4), 'not a checkpoint'),
    ],
    ids=['empty', 'lfs', 'html', 'xml', 'text', 'json', 'noise', 'plain pickle'],
)
def test_no_checkpoint_at_all(tmp_path, content, message) -> None:
    path = tmp_path / 'mobile_sam.pt'
    path.write_bytes(content)
    text = _refusal(path)
    assert message in text and 'run `python tools/download.py mobile_sam' in text


def test_torchscript(tmp_path) -> None:
    path = tmp_path / 'a.pt'
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(path)
    assert 'a TorchScript program' in _refusal(path)


def test_missing(tmp_path, monkeypatch) -> None:
    assert 'run `python tools/download.py sam_vit_h --root ' in _refusal(tmp_path / 'sam_vit_h_4b8939.pth')
    monkeypatch.setenv('PTQSAM_CKPT', str(tmp_path))
    assert _refusal(tmp_path / 'sam_vit_h_4b8939.pth').endswith('run `python tools/download.py sam_vit_h`')
    assert _refusal(tmp_path / 'mine.pth').endswith('correct the path or put the file there')
    assert 'cannot be read (Is a directory)' in _refusal(tmp_path)


@pytest.mark.parametrize(
    ('content', 'found'),
    [
        ({'epoch': 1, 'net': {'a': torch.ones(1)}}, 'a dict of epoch, net'),
        ([torch.ones(1)], 'a list'),
        (torch.ones(1), 'a Tensor'),
        ({}, 'a dict of nothing'),
    ],
)
def test_no_state_dict_inside(tmp_path, content, found) -> None:
    torch.save(content, tmp_path / 'a.pth')
    assert f"holds no state dict, neither bare nor under 'state_dict' or 'model', but {found}" in _refusal(
        tmp_path / 'a.pth'
    )


# what executes, or may execute, code from a file that it reads; torch.load is for ptqsam/weights.py alone
UNSAFE = re.compile(
    r'\b(c?[Pp]ickle|dill|joblib)\.(loads?|Unpickler)\b|\bfrom (pickle|dill|joblib) import\b'
    r"|allow_pickle['\"]?\s*[=:]\s*(?!\s*False)|weights_only['\"]?\s*[=:]\s*(?!\s*True)"
)
TORCH_LOAD = re.compile(r'\btorch\.(jit\.)?load\s*\(|\bfrom torch(\.serialization)? import .*\bload\b')


def _unsafe_lines(text: str, may_load: bool) -> list[str]:
    return [line for line in text.splitlines() if UNSAFE.search(line) or (TORCH_LOAD.search(line) and not may_load)]


def test_unsafe_loading_is_nowhere_in_the_source() -> None:
    paths = [path for folder in ('ptqsam', 'projects', 'tools') for path in sorted((ROOT / folder).rglob('*.py'))]
    assert Path(weights.__file__) in paths and len(paths) > 30
    found = [
        f'{path.relative_to(ROOT)}: {line.strip()}'
        for path in paths
        for line in _unsafe_lines(path.read_text(encoding='utf-8'), may_load=path == Path(weights.__file__))
    ]
    assert not found, '\n'.join(found)


@pytest.mark.parametrize(
    ('line', 'unsafe', 'unsafe_in_weights'),
    [
        # the word False is put in, so that a search of the repository for the bad setting finds nothing
        (f'torch.load(path, weights_only={False})', True, True),
        (f"options = {{'weights_only': {False}}}", True, True),
        ('torch.load(path, weights_only = trusted)', True, True),
        ("torch.load(path, map_location='cpu', weights_only=True)", True, False),
        ('from torch import load', True, False),
        ('pickle.load(file)', True, True),
        ('from pickle import loads', True, True),
        ('np.load(path, allow_pickle=True)', True, True),
        ('np.load(path, allow_pickle=False)', False, False),
        ('load_weights(path)', False, False),
        ('torch.load_library(path)', False, False),
    ],
)
def test_unsafe_loading_would_be_found(line, unsafe, unsafe_in_weights) -> None:
    assert bool(_unsafe_lines(line, may_load=False)) is unsafe
    assert bool(_unsafe_lines(line, may_load=True)) is unsafe_in_weights


@pytest.mark.parametrize('name', ['mobile_sam.pt', 'yolox_nano_mmdet.pth'])
def test_real_checkpoints(name, assets) -> None:
    loaded = load_weights(assets / 'ckpt' / name)
    assert len(loaded) == {'mobile_sam.pt': 439, 'yolox_nano_mmdet.pth': 642}[name]
    assert all(tensor.isfinite().all() for tensor in loaded.values())
