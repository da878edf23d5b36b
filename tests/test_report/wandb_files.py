"""Make runs that report to wandb, read back what it wrote, and see what it has running."""

import json
import os
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

RECIPE = """
_base_: {base}
reconstruction: {{iters: 4, unit: block, max_boxes: 2, tokens_per_step: 64}}
"""
OPTIONS = ('--wandb', 'test', '--wandb-options', 'group=grid', 'id=cell-1', 'tags=a,b', 'name=mse, w4a8 = 1e3')


def run_tool(tiny: Path, work_dir: Path, *more: object) -> int:
    """Reconstruct the tiny SAM with the command line, in this process."""
    from ptqsam.cli import main

    recipe = tiny / 'reconstructed.yaml'
    recipe.write_text(RECIPE.format(base=tiny / 'recipe.yaml'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PTQSAM_CACHE', str(tiny / 'cache'))
        return main([str(word) for word in (tiny / 'tiny.py', recipe, '--work-dir', work_dir, *OPTIONS, *more)])


def read_run(work_dir: Path) -> SimpleNamespace:
    """Content of the one offline run in a work dir."""
    from wandb.proto import wandb_internal_pb2

    (path,) = work_dir.glob('wandb/offline-run-*/run-*.wandb')
    run = SimpleNamespace(config={}, summary={}, history={}, rows=[], axes={}, summaries={}, start=None, exit_code=None)
    run.folder = path.parent
    for data in read_records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        match record.WhichOneof('record_type'):
            case 'run':
                run.start = record.run
                run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            case 'summary':
                merge(run.summary, record.summary.update)
            case 'history':
                merge(run.history, record.history.item)
                run.rows.append({})
                merge(run.rows[-1], record.history.item)
            case 'metric':
                name = record.metric.name or record.metric.glob_name
                run.axes[name] = record.metric.step_metric
                run.summaries[name] = {field.name for field, _ in record.metric.summary.ListFields()}
            case 'exit':
                run.exit_code = record.exit.exit_code
    return run


def points(run: SimpleNamespace, axis: str, name: str) -> dict:
    """A metric over its axis, from the rows that have both."""
    return {row[axis]: row[name] for row in run.rows if axis in row and name in row}


def table(run: SimpleNamespace, name: str) -> dict:
    """Content of a logged table."""
    return json.loads((run.folder / 'files' / run.history[name]['path']).read_text())


def merge(values: dict, items) -> None:
    """Put the items of a record into a dict, those of a picture or table into one of their own."""
    for item in items:
        *parents, key = item.nested_key or [item.key]
        place = values
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = json.loads(item.value_json)


def read_records(data: bytes) -> list[bytes]:
    """Records of a file in LevelDB's log format: 7 bytes of file header, blocks of 32 KiB, chunks with crc, length
    and type (1 whole, 2 first, 3 middle, 4 last)."""
    block, position, records, parts = 2**15, 7, [], []
    while position < len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from('<IHB', data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):
            records.append(b''.join(parts))
            parts = []
    assert not parts, 'the file ends within a record'
    return records


def children() -> list[int]:
    """This process's children that belong to wandb."""
    found = []
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(stat.read_text().rpartition(')')[2].split()[1])
            command = (stat.parent / 'cmdline').read_text()
        except (OSError, IndexError):
            continue
        if parent == os.getpid() and 'wandb' in command:
            found.append(int(stat.parent.name))
    return found
