"""One process decides for all: its result or its error, by two real processes."""

import subprocess
import sys

import pytest

from ptqsam.distributed import decided_by_main
from ptqsam.errors import GateError
from tests.tiny import ROOT

PROCESS = """
import sys
import torch.distributed as dist
from ptqsam.distributed import decided_by_main
from ptqsam.errors import ConfigError

rank = int(sys.argv[1])
dist.init_process_group('gloo', init_method=f'file://{sys.argv[2]}', rank=rank, world_size=2)

def decide():
    assert rank == 0
    return {'range': 1.5}

def refuse():
    raise ConfigError('there is no box')

print(decided_by_main(decide))
try:
    decided_by_main(refuse)
except ConfigError as error:
    print(f'{error}, exit {error.exit_code}')
dist.destroy_process_group()
"""


def test_all_processes_get_the_result_or_the_error(tmp_path):
    command = [sys.executable, '-c', PROCESS]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path / 'store')], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=120)
            assert (process.returncode, out) == (0, "{'range': 1.5}\nthere is no box, exit 2\n")
    finally:
        for process in processes:
            process.kill()


def test_one_process():
    def refuse():
        raise GateError('NaN')

    assert decided_by_main(lambda: None) is None
    with pytest.raises(GateError, match='NaN'):
        decided_by_main(refuse)
