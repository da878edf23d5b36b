"""Several real processes that work together, started as torchrun would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT


def start_processes(count: int, *args: object, cwd: Path, program: object = ROOT / 'tools/test_quant.py') -> list:
    """Start a program several times, as the processes of one run.

    Args:
        count: number of processes.
        args: command line.
        cwd: working folder.
        program: Python file.

    Returns:
        The processes, in the order of their ranks; their output is text.
    """
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        port = listener.getsockname()[1]
    common = dict(WORLD_SIZE=str(count), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), PYTHONPATH=str(ROOT))
    return [
        subprocess.Popen(
            [sys.executable, str(program), *map(str, args)],
            cwd=cwd,
            env={**os.environ, **common, 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'OMP_NUM_THREADS': '1'},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def finish_processes(processes: list, timeout: float = 300) -> list[tuple[int, str, str]]:
    """Wait for all: exit code, stdout and stderr of each. None survives."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]
