"""One against two processes on real weights and images: boxes of a detector, quantized weights, metrics."""

import json

from tests.processes import finish_processes, start_processes
from tests.tiny import ROOT


def test_two_processes_give_the_numbers_of_one(assets, tmp_path, monkeypatch):
    monkeypatch.setenv('PTQSAM_DATA', str(assets / 'data'))
    monkeypatch.setenv('PTQSAM_CKPT', str(assets / 'ckpt'))
    config, recipe = ROOT / 'configs/yolox/yolox-nano_mobile-sam.py', ROOT / 'exp/minmax/w8a8.yaml'
    few = ['--limit', 3, '--cfg-options', 'model.test_cfg.max_boxes=4', 'model.test_cfg.chunk_size=4']
    few += ['--quant-options', 'calibration.num_images=2', 'calibration.max_boxes=4']
    for count, launcher in ((1, 'none'), (2, 'pytorch')):
        monkeypatch.setenv('PTQSAM_CACHE', str(tmp_path / f'boxes{count}'))
        command = [config, recipe, *few, '--work-dir', tmp_path / f'run{count}', '--launcher', launcher]
        for code, _, err in finish_processes(start_processes(count, *command, cwd=tmp_path), 600):
            assert code == 0, err
    one, two = (json.loads((tmp_path / f'run{count}/result.json').read_text()) for count in (1, 2))
    assert one['metrics'] == two['metrics']
    assert one['metrics']['quant']['mask_matched'] > 0.2
    for folder, pattern in (('boxes', '*.json'), ('run', 'packed/model.safetensors')):
        files = [sorted((tmp_path / f'{folder}{count}').glob(pattern)) for count in (1, 2)]
        assert [file.name for file in files[0]] == [file.name for file in files[1]]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))
        assert len(files[0]) == (2 if folder == 'boxes' else 1)
