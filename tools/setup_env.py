"""Create .venv and install into it what requirements.txt pins, and this project: the whole of ``make setup``.

Standard library only, since it runs before anything is installed. pip's own settings (indexes, wheel folders, proxies)
are left alone, so that whoever has them pointed at another build of torch gets that build.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
STAMP = VENV / 'ptqsam-setup.json'
LOG = VENV / 'setup.log'
MMCV_LOG = VENV / 'mmcv-build.log'
REQUIREMENTS = ROOT / 'requirements.txt'
# a change in one of these makes the next run install again
INPUTS = (REQUIREMENTS, ROOT / 'setup.py', ROOT / 'pyproject.toml', Path(__file__).resolve())
# what mmcv needs to be built, and to be imported afterwards
BEFORE_MMCV = ('pip', 'setuptools', 'wheel', 'ninja', 'torch', 'numpy', 'opencv-python')
OLDEST_PYTHON = '3.11'
HEARTBEAT_SECONDS = 15
# what one compiler process takes on torch's headers
GIB_PER_JOB = 2


class SetupError(Exception):
    """Ends the run with one message and exit code 1."""


def say(text: str) -> None:
    print(f'setup: {text}', flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a step under way is ended too
    try:
        if sys.version_info < tuple(map(int, OLDEST_PYTHON.split('.'))):
            found = '{}.{}'.format(*sys.version_info)
            raise SetupError(
                f'needs Python {OLDEST_PYTHON} or newer, {sys.executable} is {found}; '
                f'name another one: export PYTHON=python{OLDEST_PYTHON}'
            )
        wanted = wanted_state()
        if is_ready(wanted):
            return 0
        # a second `make` beside this one waits here and then finds the work done
        with open(__file__, 'r+') as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_ready(wanted):
                install(wanted)
    except SetupError as error:
        print(f'setup: {error}', file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print('setup: interrupted; run it again to go on', file=sys.stderr, flush=True)
        return 130
    return 0


def wanted_state() -> dict[str, str]:
    """What the finished environment depends on: interpreter, place, and the files that describe it."""
    digest = hashlib.sha256()
    for path in INPUTS:
        digest.update(path.read_bytes() if path.is_file() else b'')
        digest.update(b'\0')
    return {'python': sys.version.split()[0], 'root': str(ROOT), 'inputs': digest.hexdigest()}


def is_ready(wanted: dict[str, str]) -> bool:
    try:
        return PYTHON.exists() and json.loads(STAMP.read_text()) == wanted
    except (OSError, ValueError):
        return False


def install(wanted: dict[str, str]) -> None:
    """Bring .venv to the wanted state; every step may be repeated, so that an interrupted run is simply run again."""
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    for problem in missing_build_tools():
        say(f'note: {problem}; mmcv is compiled from source unless pip has a wheel of it')
    make_venv()
    for name in forget_damaged(Path(site_packages())):
        say(f'{name} was left incomplete and is installed again')
    pip = [str(PYTHON), '-m', 'pip', '--no-input', '--disable-pip-version-check', 'install', '--progress-bar', 'off']
    pinned = [*pip, '-c', str(REQUIREMENTS)]
    # one call, because torch alone would pull a setuptools that is too new to build mmcv
    run('torch, OpenCV and the build tools', [*pinned, *BEFORE_MMCV], LOG)
    make_cv2_load(pip)
    install_mmcv(pinned)
    run('the other packages', [*pip, '-r', str(REQUIREMENTS)], LOG)
    run('this project', [*pip, '--no-deps', '--no-build-isolation', '--editable', str(ROOT)], LOG)
    temporary = STAMP.with_suffix('.tmp')
    temporary.write_text(json.dumps(wanted, indent=2) + '\n')
    os.replace(temporary, STAMP)
    say(f'ready in {elapsed(started)}: .venv')


def make_venv() -> None:
    """Create .venv, or keep one that is of this interpreter, was made in this place, and has a working pip."""
    if importlib.util.find_spec('ensurepip') is None:
        raise SetupError(f'{sys.executable} cannot make virtual environments; Debian: apt-get install python3-venv')
    if PYTHON.exists():
        check = subprocess.run(
            [str(PYTHON), '-c', 'import pip, sys; print(sys.version.split()[0], sys.prefix)'],
            capture_output=True,
            text=True,
        )
        script = VENV / 'bin' / 'pip'
        # a venv that was moved still runs, but its scripts and the link to this project point to the old place
        moved = not script.exists() or str(VENV) not in script.read_text()[:300]
        if check.stdout.strip() == f'{sys.version.split()[0]} {VENV}' and not moved:
            return
        say('.venv is of another Python, was moved or is damaged: made anew')
    else:
        say('creating .venv')
    done = subprocess.run([sys.executable, '-m', 'venv', '--clear', str(VENV)], capture_output=True, text=True)
    if done.returncode:
        reason = ' '.join((done.stderr or done.stdout).split())[-300:]
        raise SetupError(f'{VENV}: cannot create the virtual environment: {reason}')


def site_packages() -> str:
    return sysconfig.get_path('purelib', vars={'base': str(VENV), 'platbase': str(VENV)})


def forget_damaged(folder: Path) -> list[str]:
    """Remove the records of packages whose files are not all there, so that pip installs them again.

    A pip that was killed leaves such packages behind, and the next one takes them for installed.

    Args:
        folder: a site-packages folder.

    Returns:
        The names of what was forgotten.
    """
    forgotten = []
    for backup in folder.glob('~*'):  # pip's own backups, which it only removes when it ends in order
        shutil.rmtree(backup, ignore_errors=True)
    for record_folder in sorted(folder.glob('*.dist-info')):
        if not is_complete(record_folder):
            shutil.rmtree(record_folder)
            forgotten.append(record_folder.name.split('-')[0])
    return forgotten


def is_complete(record_folder: Path) -> bool:
    """True when every file that a package's RECORD lists is there in the size that it states."""
    try:
        with open(record_folder / 'RECORD', newline='') as file:
            for name, _, size in csv.reader(file):
                # byte code is made, and may be removed, at any time
                if not name.endswith('.pyc'):
                    actual = (record_folder.parent / name).stat().st_size
                    if size and actual != int(size):
                        return False
    except (OSError, ValueError):
        return False
    return True


def missing_build_tools() -> list[str]:
    problems = []
    if not any(shutil.which(name) for name in (os.environ.get('CXX', 'c++'), 'g++', 'clang++')):
        problems.append('no C++ compiler found (Debian: apt-get install g++)')
    if not Path(sysconfig.get_path('include'), 'Python.h').is_file():
        problems.append('no Python.h found (Debian: apt-get install python3-dev)')
    return problems


def install_mmcv(pinned: list[str]) -> None:
    """Install mmcv, which PyPI has only as source, and see to it that its operators fit the torch that is installed."""
    with_cuda, why = wants_cuda_operators(**torch_facts())
    if why:
        say(why)
    command = [*pinned, '-v', '--no-build-isolation', 'mmcv']
    # pip's cache does not know which torch a wheel was built against, so what came from it may not load
    again = [*command, '--no-cache-dir', '--force-reinstall', '--no-deps', '--no-binary', 'mmcv']
    run('mmcv (compiled once, 9 to 20 minutes on 2 cores)', command, MMCV_LOG, build_environment(with_cuda))
    problem = mmcv_problem(with_cuda)
    if problem:
        say(f'the mmcv at hand does not fit ({problem}): compiling it anew')
        try:
            run('mmcv, anew', again, MMCV_LOG, build_environment(with_cuda))
        except SetupError as error:
            if not with_cuda:
                raise
            say(f'mmcv did not compile with CUDA operators, so it gets CPU operators only; {error}')
            with_cuda = False
            run('mmcv, for CPU', again, MMCV_LOG, build_environment(with_cuda))
        problem = mmcv_problem(with_cuda)
    if problem:
        raise SetupError(f'mmcv was installed but does not load: {problem}; the whole log: {MMCV_LOG}')


def torch_facts() -> dict[str, object]:
    """What the installed torch and the CUDA toolkit beside it are, asked in the environment itself."""
    code = (
        'import json, torch\n'
        'from torch.utils.cpp_extension import CUDA_HOME\n'
        'print(json.dumps([torch.version.cuda, torch.cuda.is_available(), CUDA_HOME]))'
    )
    done = subprocess.run([str(PYTHON), '-c', code], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f'torch was installed but does not load: {last_line(done.stderr)}')
    torch_cuda, gpu, toolkit = json.loads(last_line(done.stdout))
    nvcc = None
    if toolkit:
        compiler = Path(toolkit, 'bin', 'nvcc')
        if compiler.is_file():
            printed = subprocess.run([str(compiler), '--version'], capture_output=True, text=True).stdout
            release = re.search(r'release (\d+\.\d+)', printed)
            nvcc = release.group(1) if release else None
    return {'torch_cuda': torch_cuda, 'gpu': gpu, 'nvcc': nvcc}


def wants_cuda_operators(torch_cuda: str | None, gpu: bool, nvcc: str | None) -> tuple[bool, str]:
    """Whether mmcv can be built with CUDA operators, and a line for the user where that may surprise.

    Args:
        torch_cuda: CUDA version of torch, None for a CPU build.
        gpu: whether torch sees a GPU.
        nvcc: version of the CUDA compiler, None if there is none.
    """
    if torch_cuda is None or not gpu:
        return False, ''
    if nvcc is None or nvcc.split('.')[0] != torch_cuda.split('.')[0]:
        found = f'nvcc is {nvcc}' if nvcc else 'there is no nvcc'
        return False, (
            f'torch is built for CUDA {torch_cuda} but {found}: mmcv gets CPU operators only, so detectors that need '
            'them run on the CPU; with a fitting toolkit in CUDA_HOME, remove .venv and run make setup again'
        )
    return True, ''


def build_environment(with_cuda: bool) -> dict[str, str]:
    env = {
        'PATH': f'{VENV / "bin"}{os.pathsep}{os.environ.get("PATH", "")}',  # without ninja on it, one file at a time
        'PYTHONUNBUFFERED': '1',
        'MMCV_WITH_OPS': '1',
        'MAX_JOBS': os.environ.get('MAX_JOBS') or str(jobs()),
    }
    # mmcv's build decides by what torch sees, and stops at a GPU without a fitting compiler
    return env if with_cuda else {**env, 'CUDA_VISIBLE_DEVICES': '', 'FORCE_CUDA': '0'}


def jobs() -> int:
    """Compiler processes to run at once: one per core, fewer where memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    available = re.search(r'MemAvailable:\s+(\d+) kB', read_if_there('/proc/meminfo'))
    limits = [int(available.group(1)) // 2**20] if available else []
    container = read_if_there('/sys/fs/cgroup/memory.max').strip()
    if container.isdigit():
        limits.append(int(container) // 2**30)
    return max(1, min([cores, *(gib // GIB_PER_JOB for gib in limits)]))


def read_if_there(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ''


def mmcv_problem(with_cuda: bool) -> str:
    """Why the installed mmcv cannot be used, or an empty string."""
    code = 'from mmcv.ops import get_compiling_cuda_version\nprint(get_compiling_cuda_version())'
    done = subprocess.run([str(PYTHON), '-c', code], capture_output=True, text=True)
    if done.returncode:
        return last_line(done.stderr)
    if with_cuda and last_line(done.stdout) == 'not available':
        return 'it has no CUDA operators'
    return ''


def make_cv2_load(pip: list[str]) -> None:
    """Where a machine without a screen lacks OpenGL and X11, put the headless build of OpenCV over the usual one.

    mmengine and mmcv require the usual one by name, so its record stays; the files of the two have the same names.
    """

    def problem() -> str:
        done = subprocess.run([str(PYTHON), '-c', 'import cv2'], capture_output=True, text=True)
        return last_line(done.stderr) if done.returncode else ''

    reason = problem()
    if not reason:
        return
    say(f'opencv-python does not load here ({reason}): its headless build takes its place')
    headless = f'opencv-python-headless=={pinned_version("opencv-python")}'
    run('the headless OpenCV', [*pip, '--no-deps', '--force-reinstall', headless], LOG)
    reason = problem()
    if reason:
        raise SetupError(f'OpenCV does not load: {reason}; Debian: apt-get install libgl1 libglib2.0-0, then again')


def pinned_version(name: str) -> str:
    match = re.search(rf'^{re.escape(name)}==(\S+)', REQUIREMENTS.read_text(), re.MULTILINE)
    if match is None:
        raise SetupError(f'{REQUIREMENTS}: no line {name}==VERSION; put it back')
    return match.group(1)


def run(title: str, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
    """Run one step with its output in a log file, and a sign of life on the terminal every so often.

    Args:
        title: what is being installed.
        command: program and arguments.
        log: file to append to; its folder exists.
        env: variables to add to the environment.

    Raises:
        SetupError: the step failed; the message holds the end of its output and the log's path.
    """
    say(f'installing {title}')
    started = time.monotonic()
    with open(log, 'ab') as output:
        begin = output.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=HEARTBEAT_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    say(f'  still at it after {elapsed(started)}{compiled(log, begin)}')
        except BaseException:
            # the compilers are grandchildren: end the whole group
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if code:
        hints = ''.join(f'\n{problem}' for problem in missing_build_tools())
        raise SetupError(f'installing {title} failed:\n{excerpt(log, begin)}{hints}\nthe whole log: {log}')


def elapsed(started: float) -> str:
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def compiled(log: Path, begin: int) -> str:
    """How far ninja has got, from the ``[12/77]`` that begins its lines, or an empty string."""
    with open(log, 'rb') as file:
        file.seek(max(begin, log.stat().st_size - 2**18))
        counts = re.findall(rb'^\s*\[(\d+)/(\d+)\] ', file.read(), re.MULTILINE)
    return ', {} of {} files compiled'.format(*(number.decode() for number in counts[-1])) if counts else ''


def excerpt(log: Path, begin: int) -> str:
    """The first lines of a log that speak of an error, and its last lines."""
    with open(log, 'rb') as file:
        file.seek(begin)
        lines = [line.rstrip()[:300] for line in file.read().decode(errors='replace').splitlines() if line.strip()]
    errors = [line for line in lines[:-12] if re.search(r'\berror\b', line, re.IGNORECASE)][:5]
    return '\n'.join(f'    {line}' for line in [*errors, *lines[-12:]])


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ''


if __name__ == '__main__':
    sys.exit(main())
