"""The logic of ``make setup``; what it does with pip is seen by running it."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from tests.tiny import ROOT

# how long a busy machine may take for what an idle one does at once
PATIENCE_SECONDS = 20


@pytest.fixture
def setup_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a module, working in a temporary folder."""
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'setup_env.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    inputs = (tmp_path / 'requirements.txt', tmp_path / 'setup.py')
    for path in inputs:
        path.write_text('opencv-python==1.2.3\n')
    # main() locks its own file, which a `make setup` beside the tests may hold
    (tmp_path / 'setup_env.py').touch()
    monkeypatch.setattr(module, '__file__', str(tmp_path / 'setup_env.py'))
    venv = tmp_path / '.venv'
    (venv / 'bin').mkdir(parents=True)
    (venv / 'bin' / 'python').write_text('')
    places = {'ROOT': tmp_path, 'VENV': venv, 'PYTHON': venv / 'bin' / 'python', 'STAMP': venv / 'stamp.json'}
    for name, value in {**places, 'INPUTS': inputs, 'REQUIREMENTS': inputs[0]}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module.signal, 'signal', lambda *_: None)
    return module


def test_second_run_does_nothing(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def install(wanted: dict[str, str]) -> None:
        runs.append(wanted)
        setup_env.STAMP.write_text(json.dumps(wanted))

    monkeypatch.setattr(setup_env, 'install', install)
    assert [setup_env.main(), setup_env.main(), len(runs)] == [0, 0, 1]
    setup_env.INPUTS[1].touch()  # a checkout touches files without changing them
    assert [setup_env.main(), len(runs)] == [0, 1]
    setup_env.INPUTS[1].write_text('other')
    assert [setup_env.main(), len(runs)] == [0, 2]
    setup_env.PYTHON.unlink()
    assert [setup_env.main(), len(runs)] == [0, 3]
    setup_env.STAMP.write_text('{')  # cut off
    assert [setup_env.main(), len(runs)] == [0, 4]


def test_old_python_is_refused_in_one_line(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(setup_env, 'OLDEST_PYTHON', '9.10')
    assert setup_env.main() == 1
    message = capsys.readouterr().err
    assert message.count('\n') == 1
    assert 'needs Python 9.10 or newer' in message
    assert 'export PYTHON=python9.10' in message


def test_interrupt_ends_in_one_line(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def install(wanted: dict[str, str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, 'install', install)
    assert setup_env.main() == 130
    assert capsys.readouterr().err == 'setup: interrupted; run it again to go on\n'


def test_damaged_packages_are_forgotten(setup_env: ModuleType, tmp_path: Path) -> None:
    site = tmp_path / 'site-packages'

    def package(name: str, record: str | None) -> None:
        (site / name).mkdir(parents=True)
        (site / name / '__init__.py').write_text('12345')
        folder = site / f'{name}-1.0.dist-info'
        folder.mkdir()
        if record is not None:
            (folder / 'RECORD').write_text(record)

    package('whole', 'whole/__init__.py,sha256=x,5\nwhole/__pycache__/a.pyc,,\nwhole-1.0.dist-info/RECORD,,\n')
    package('cut', 'cut/__init__.py,sha256=x,6\n')
    package('lacking', 'lacking/__init__.py,sha256=x,5\n"lacking/a, b.py",sha256=x,5\n')
    package('norecord', None)
    (site / '~hole').mkdir()
    assert setup_env.forget_damaged(site) == ['cut', 'lacking', 'norecord']
    assert [path.name for path in site.glob('*.dist-info')] == ['whole-1.0.dist-info']
    assert not (site / '~hole').exists()
    assert setup_env.forget_damaged(site) == []


@pytest.mark.parametrize(
    ('torch_cuda', 'gpu', 'nvcc', 'expected', 'said'),
    [
        (None, False, None, False, ''),
        (None, False, '13.0', False, ''),
        ('13.0', False, '13.0', False, ''),
        ('13.0', True, '13.1', True, ''),
        ('13.0', True, None, False, 'there is no nvcc'),
        ('13.0', True, '12.8', False, 'nvcc is 12.8'),
    ],
)
def test_cuda_operators_are_wanted_where_they_can_be_built(
    setup_env: ModuleType, torch_cuda: str | None, gpu: bool, nvcc: str | None, expected: bool, said: str
) -> None:
    wanted, why = setup_env.wants_cuda_operators(torch_cuda, gpu, nvcc)
    assert wanted is expected
    assert said in why
    assert bool(said) == bool(why)
    environment = setup_env.build_environment(wanted)
    assert ('CUDA_VISIBLE_DEVICES' in environment) is not expected
    assert int(environment['MAX_JOBS']) >= 1


def test_mmcv_that_does_not_fit_is_built_anew(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # from pip's cache comes a wheel without CUDA operators, building them fails, CPU operators it is
    steps: list[tuple[str, bool, bool]] = []
    monkeypatch.setattr(setup_env, 'torch_facts', lambda: {'torch_cuda': '13.0', 'gpu': True, 'nvcc': '13.0'})
    monkeypatch.setattr(setup_env, 'mmcv_problem', lambda with_cuda: 'it has no CUDA operators' if with_cuda else '')

    def run(title: str, command: list[str], log: Path, env: dict[str, str]) -> None:
        steps.append((title.split(' (')[0], '--no-cache-dir' in command, 'CUDA_VISIBLE_DEVICES' in env))
        if title == 'mmcv, anew':
            raise setup_env.SetupError('nvcc says no')

    monkeypatch.setattr(setup_env, 'run', run)
    setup_env.install_mmcv(['pip', 'install'])
    assert steps == [('mmcv', False, False), ('mmcv, anew', True, False), ('mmcv, for CPU', True, True)]


def test_mmcv_that_never_loads_is_an_error(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_env, 'torch_facts', lambda: {'torch_cuda': None, 'gpu': False, 'nvcc': None})
    monkeypatch.setattr(setup_env, 'mmcv_problem', lambda with_cuda: 'undefined symbol')
    monkeypatch.setattr(setup_env, 'run', lambda *_: None)
    with pytest.raises(setup_env.SetupError, match='does not load: undefined symbol'):
        setup_env.install_mmcv(['pip', 'install'])


def test_headless_opencv_of_the_same_version(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter of the environment is played by a script: cv2 imports only once the headless build is there
    commands: list[list[str]] = []
    installed = setup_env.ROOT / 'headless'
    setup_env.PYTHON.write_text(
        f'#!/bin/sh\ntest -e {installed} || {{ echo "ImportError: libGL.so.1" >&2; exit 1; }}\n'
    )
    setup_env.PYTHON.chmod(0o755)

    def run(title: str, command: list[str], log: Path) -> None:
        commands.append(command)
        installed.touch()

    monkeypatch.setattr(setup_env, 'run', run)
    setup_env.make_cv2_load(['pip', 'install'])
    setup_env.make_cv2_load(['pip', 'install'])
    assert len(commands) == 1
    assert commands[0][-1] == 'opencv-python-headless==1.2.3'


def test_step_shows_that_it_is_at_work(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    log = tmp_path / 'log'
    log.write_text('[9/9] of an earlier step\n')
    monkeypatch.setattr(setup_env, 'HEARTBEAT_SECONDS', 0.2)
    seen, say = tmp_path / 'seen', setup_env.say

    def watch(text: str) -> None:
        say(text)
        if '12 of 77 files compiled' in text:
            seen.touch()

    monkeypatch.setattr(setup_env, 'say', watch)
    # the step ends once the heartbeat has told of it; it fails where that takes too long
    code = (
        'import os, sys, time\n'
        "print('  [12/77] c++ a.cpp', flush=True)\n"
        f'end = time.monotonic() + {PATIENCE_SECONDS}\n'
        'while not os.path.exists(sys.argv[1]):\n'
        '    assert time.monotonic() < end\n'
        '    time.sleep(0.01)\n'
    )
    setup_env.run('a step', [sys.executable, '-c', code, str(seen)], log)
    printed = capsys.readouterr().out
    assert printed.startswith('setup: installing a step\n')
    assert '12 of 77 files compiled' in printed
    assert '9 of 9' not in printed


def test_failed_step_says_why_and_where(setup_env: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / 'log'
    code = "print('a.cpp:1: fatal error: no such file')\nfor i in range(40): print('line', i)\nraise SystemExit(3)"
    with pytest.raises(setup_env.SetupError) as caught:
        setup_env.run('a step', [sys.executable, '-c', code], log)
    message = str(caught.value)
    assert message.startswith('installing a step failed:\n')
    assert 'fatal error: no such file' in message
    assert 'line 39' in message
    assert 'line 20' not in message
    assert message.endswith(f'the whole log: {log}')


def test_interrupted_step_leaves_no_process(
    setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, pids = tmp_path / 'log', tmp_path / 'pids'

    def say(text: str) -> None:
        if pids.exists() and 'still at it' in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(setup_env, 'say', say)
    monkeypatch.setattr(setup_env, 'HEARTBEAT_SECONDS', 0.05)
    command = ['bash', '-c', f'sleep 60 & echo $$ $! > {pids}.part; mv {pids}.part {pids}; wait']
    with pytest.raises(KeyboardInterrupt):
        setup_env.run('a step', command, log)
    # the group has got its signal; a busy machine may take its time to act on it
    end = time.monotonic() + PATIENCE_SECONDS
    running = [int(pid) for pid in pids.read_text().split()]
    assert len(running) == 2
    while running and time.monotonic() < end:
        time.sleep(0.02)
        running = [pid for pid in running if is_running(pid)]
    assert not running


def is_running(pid: int) -> bool:
    """True for a process that has neither ended nor only waits to be collected."""
    try:
        os.kill(pid, 0)
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False
