"""PCC on models: what is locked and stays so, what the report says is what the model does, planted outliers survive."""

import csv
import json
import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from mmengine.logging import MMLogger

from ptqsam.cli import main
from ptqsam.config import parse_quant_config
from ptqsam.errors import ConfigError, GateError
from ptqsam.focus import PERCENTILES, Pass, focus_distance
from ptqsam.functional import choose_qparams
from ptqsam.hooks import ConditionNumberReduction, PerceptualClipping
from ptqsam.hooks.perceptual_clipping import FILES, capture, embed_images, find_targets
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.quantizers import LSQ
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.solver.calibrate import calibrate_activations
from ptqsam.solver.outputs import PREPARATION_FILES
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.test_hooks.test_condition_number import Loader
from tests.test_projects.helpers import make_model
from tests.tiny import ALONE, ARCH, write_pipeline

DECODER = 'mask_decoder.transformer'
CROSS = f'{DECODER}.layers.1.cross_attn_token_to_image'
OBSERVER = {'weight': {'type': 'MinMax'}, 'act': {'type': 'MinMax'}}
RECIPE = dict(algorithm='x', bits={'weight': 4, 'act': 4}, calibration={'observer': OBSERVER, 'max_boxes': 4})
FEW = dict(percentiles=(0.9, 0.97, 0.99), passes=1)


def plant(state, factor=1000.0):
    """One channel of q so many times as large, and of k as small, in all decoder attentions: q k^T stays as it is."""
    for name in list(state):
        for side, sign in (('q', 1), ('k', -1)):
            if name.startswith(DECODER) and f'.{side}_proj.' in name:
                state[name][2] *= factor**sign


def make_loop(tmp_path, counts=(6, 0, 7), planted=False, **recipe):
    """What the hook sees of a run: a prepared model and calibration images with so many boxes."""
    model = make_model()
    state = model.sam.state_dict()
    for name, value in state.items():
        if name.startswith(DECODER) and ('.q_proj.w' in name or '.k_proj.w' in name):
            value *= 4  # random weights look everywhere, these at something
    if planted:
        plant(state)
    rules = RuleBook(parse_quant_config(RECIPE | recipe, 'test'))
    quantize_model(model.sam, rules)
    return SimpleNamespace(
        model=model,
        target=model.sam,
        calib_loader=Loader(counts),
        recipe=rules.config,
        rules=rules,
        work_dir=tmp_path,
        **ALONE,
    )


def run_hook(loop, **settings):
    """Run the hook; its table, path -> row."""
    runner = SimpleNamespace(test_loop=loop, logger=MMLogger.get_instance('clipping'))
    with patch('ptqsam.hooks.perceptual_clipping.plot_clipping'):  # takes most of the time
        PerceptualClipping(**settings).before_calibrate(runner)
    return read_table(loop.work_dir)


def read_table(folder):
    with open(folder / 'clipping.csv', newline='') as file:
        rows = {row.pop('quantizer'): row for row in csv.DictReader(file)}
    return {path: {k: float(v) if v else None for k, v in row.items()} for path, row in rows.items()}


def calibrate(loop):
    settings = loop.recipe.calibration
    calibrate_activations(loop.model, loop.target, loop.calib_loader, settings.max_boxes, settings.seed)


def by_path(loop):
    return {quantizer.path: quantizer for quantizer in act_quantizers(loop.target)}


def params(row, whose, quantizer):
    return choose_qparams(*(torch.tensor(row[f'{whose}{end}']) for end in ('lo', 'hi')), quantizer.bits, False)


def same(quantizer, expected):
    return torch.equal(quantizer.scale, expected[0]) and torch.equal(quantizer.zero_point, expected[1])


@pytest.mark.parametrize('kind', ['Uniform', 'LSQ'])
def test_what_is_chosen_survives_calibration(kind, tmp_path):
    loop = make_loop(tmp_path, rules=[{'match': 'role:decoder.*', 'quantizer': {'type': kind}}])
    table = run_hook(loop, **FEW)
    assert len(table) == 28 and list(table)[:4] == [
        f'{DECODER}.layers.0.self_attn.{name}' for name in ('q_proj.input', 'k_proj.input', 'q', 'k')
    ]
    for done in (lambda: None, lambda: calibrate(loop)):
        done()
        for path, quantizer in by_path(loop).items():
            assert quantizer.locked == (path in table)
            if path in table:
                assert quantizer.mode == 'quantize' and same(quantizer, params(table[path], '', quantizer))
    assert all(quantizer.mode == 'quantize' for quantizer in by_path(loop).values())
    assert not any(module._forward_pre_hooks for module in loop.target.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['clipping.csv']


def test_range_of_the_observer_is_that_of_calibration(tmp_path):
    """The recipe's observer on the same boxes of the same images."""
    table = run_hook(make_loop(tmp_path, counts=(0, 6)), **FEW)
    plain = make_loop(tmp_path, counts=(0, 6))
    calibrate(plain)
    for path, row in table.items():
        quantizer = by_path(plain)[path]
        scale, zero_point = params(row, 'observer_', quantizer)
        torch.testing.assert_close(scale, quantizer.scale, rtol=1e-5, atol=0)
        assert abs(int(zero_point) - int(quantizer.zero_point)) <= 1
        assert (row['observed_min'], row['observed_max']) == (row['observer_lo'], row['observer_hi'])


@torch.no_grad()
def test_report_is_what_the_attention_does(tmp_path):
    loop = make_loop(tmp_path)
    table = run_hook(loop, **FEW)
    for quantizer in quantizers(loop.target):
        quantizer.mode = 'off'
    (image,) = embed_images(loop, 1)
    for path in find_targets(make_loop(tmp_path).target):
        attention = loop.target.get_submodule(path)
        q_in, k_in = capture(loop, path, *image)
        inputs = [attention.get_submodule(f'{side}_proj').input_quantizer for side in 'qk']
        maps, places = {}, [*inputs, attention.q, attention.k]
        for mode in ('quantize', 'off'):  # off again for the next one
            for quantizer in places:
                quantizer.mode = mode
            q, k = attention._heads(attention.q(attention.q_proj(q_in))), attention.k(attention.k_proj(k_in))
            maps[mode] = (q @ attention._heads(k).mT / q.shape[-1] ** 0.5).softmax(-1)
        rows = [row for name, row in table.items() if name.startswith(f'{path}.')]
        assert len(rows) == 4 and len({row['attention_overlap'] for row in rows}) == 1
        overlap = 1 - float(focus_distance(maps['off'], maps['quantize'], 0.5))
        assert rows[0]['attention_overlap'] == pytest.approx(overlap, abs=1e-2)
        assert rows[0]['attention_overlap'] >= rows[0]['attention_overlap_observer']


def test_planted_outliers_survive(tmp_path):
    """Min-max ranges lose the focus to one channel; clipping keeps most of what it keeps without the outlier."""
    settings = dict(percentiles=(0.85, 0.9, 0.95, 0.97, 0.99))
    bits = dict(bits={'weight': 4, 'act': 8})
    plain, planted = (run_hook(make_loop(tmp_path, planted=p, **bits), **settings) for p in (False, True))
    path = f'{CROSS}.q'
    assert planted[path]['observed_max'] > 50 * plain[path]['observed_max']
    assert plain[path]['attention_overlap_observer'] > 0.9
    assert planted[path]['attention_overlap_observer'] < 0.6
    assert planted[path]['attention_overlap'] > planted[path]['attention_overlap_observer'] + 0.1
    assert planted[path]['hi'] < planted[path]['observer_hi'] / 10


def test_a_search_that_loses_is_not_trusted(tmp_path, monkeypatch):
    def fail(focus, *_):
        ranges = {place: (torch.tensor(-1e-3), torch.tensor(1e-3)) for place in focus.grids}
        return [Pass(ranges, dict.fromkeys(ranges, 0), {}, focus.distance(ranges))]

    monkeypatch.setattr('ptqsam.hooks.perceptual_clipping.search_ranges', fail)
    table = run_hook(make_loop(tmp_path))
    for row in table.values():
        assert row['percentile'] is None and (row['lo'], row['hi']) == (row['observer_lo'], row['observer_hi'])
        assert row['attention_overlap'] == row['attention_overlap_observer'] and row['mse'] == row['mse_observer']


def test_nothing_in_focus_changes_nothing(tmp_path):
    """With theta 1 all ranges are equally good: those of the observers stay."""
    table = run_hook(make_loop(tmp_path), theta=1.0, **FEW)
    assert all(row['percentile'] is None and row['attention_overlap'] == 1 for row in table.values())


def test_best_pass_counts(tmp_path, monkeypatch):
    def search(focus, *_):
        ranges = focus.candidates('q_input', {}, [0.9])
        one = {place: (ranges[0][0], ranges[1][0]) for place in focus.grids}
        two = {place: (2 * lo, 2 * hi) for place, (lo, hi) in one.items()}
        return [Pass(one, dict.fromkeys(one, 0), {}, -2.0), Pass(two, dict.fromkeys(two, 1), {}, -1.0)]

    monkeypatch.setattr('ptqsam.hooks.perceptual_clipping.search_ranges', search)
    assert {row['percentile'] for row in run_hook(make_loop(tmp_path)).values()} == {PERCENTILES[0]}


def test_images(tmp_path):
    loop = make_loop(tmp_path, counts=(0, 6, 0, 2, 3))
    names = [(name, len(boxes)) for name, _, boxes in embed_images(loop, 2)]
    assert names == [('1.png', 4), ('3.png', 2)], 'boxes are limited, images without do not count'
    assert len(embed_images(loop, 9)) == 3
    one, two = (run_hook(make_loop(tmp_path, counts=(0, 6, 0, 2)), images=n, **FEW) for n in (1, 2))
    assert one != two and len(one) == len(two) == 28
    alone = run_hook(make_loop(tmp_path, counts=(0, 6)), images=2, **FEW)
    assert alone == one == run_hook(make_loop(tmp_path, counts=(0, 6, 0, 2)), **FEW)
    with pytest.raises(ConfigError, match='no calibration image has a prompt box'):
        run_hook(make_loop(tmp_path, counts=(0, 0)))


def test_other_quantizers_stay_out_of_it(tmp_path):
    rules = [
        {'match': 'role:decoder.*.q_proj.input', 'quantizer': {'type': 'CAG'}},
        {'match': f'{CROSS}.k', 'enabled': False},
    ]
    loop = make_loop(tmp_path, rules=rules)
    table = run_hook(loop, **FEW)
    names = {path.rpartition('attn')[2] for path in table}
    assert len(table) == 20 and not any('q_proj' in name for name in names) and f'{CROSS}.k' not in table
    assert not any(q.calibrated for path, q in by_path(loop).items() if path not in table)
    for rule in (
        {'match': 'mask_decoder.*', 'enabled': False},
        {'match': 'role:decoder.*', 'quantizer': {'type': 'Uniform', 'ch_axis': -1}},
    ):
        with pytest.raises(ConfigError, match='quantizes no input or output of a q or k projection') as error:
            run_hook(make_loop(tmp_path, rules=[rule]))
        assert '\n' not in str(error.value)


def test_hooks_before_it(tmp_path):
    """The attention whose focus is kept is that which condition number reduction has left."""
    loop = make_loop(tmp_path)
    runner = SimpleNamespace(test_loop=loop, logger=MMLogger.get_instance('clipping'))
    with patch('ptqsam.hooks.condition_number.plot_conditions'):
        ConditionNumberReduction(threshold=1.5, iters=5).before_calibrate(runner)
    plain, table = run_hook(make_loop(tmp_path), **FEW), run_hook(loop, **FEW)
    assert plain[f'{CROSS}.q']['observed_max'] != table[f'{CROSS}.q']['observed_max']


def test_what_another_hook_has_locked(tmp_path):
    """It is float during the search, and stays as it was."""
    loop, path = make_loop(tmp_path), f'{DECODER}.layers.0.self_attn.q'
    by_path(loop)[path].lock(torch.tensor(-0.1), torch.tensor(0.2))
    before = by_path(loop)[path].scale.clone()
    table, plain = run_hook(loop, **FEW), run_hook(make_loop(tmp_path), **FEW)
    assert path not in table and len(table) == 27
    assert by_path(loop)[path].mode == 'quantize' and torch.equal(by_path(loop)[path].scale, before)
    assert table[f'{CROSS}.q'] == plain[f'{CROSS}.q']


def test_another_process_takes_what_the_main_one_found(tmp_path, monkeypatch):
    first, other = make_loop(tmp_path), make_loop(tmp_path / 'other')
    found = []
    broadcast = 'ptqsam.distributed.broadcast_object_list'
    monkeypatch.setattr(broadcast, lambda data: found.extend(data))
    run_hook(first, **FEW)
    monkeypatch.setattr(broadcast, lambda data: data.__setitem__(slice(None), found))
    for module in ('distributed', 'hooks.perceptual_clipping'):
        monkeypatch.setattr(f'ptqsam.{module}.is_main_process', lambda: False)
    runner = SimpleNamespace(test_loop=other, logger=MMLogger.get_instance('clipping'))
    PerceptualClipping(**FEW).before_calibrate(runner)
    assert not (tmp_path / 'other').exists()
    for path, quantizer in by_path(first).items():
        assert same(by_path(other)[path], (quantizer.scale, quantizer.zero_point))


def test_nan_names_attention_and_image(tmp_path):
    loop = make_loop(tmp_path)
    loop.target.get_submodule(f'{DECODER}.layers.0.self_attn').out_proj.bias[3] = torch.nan
    path = f'{DECODER}.layers.0.self_attn.q'
    by_path(loop)[path].lock(torch.tensor(-1.0), torch.tensor(1.0))
    with pytest.raises(GateError, match=rf'{DECODER}\.layers\.0\.cross.*: NaN or infinity in q or k on image 0\.png'):
        run_hook(loop, **FEW)
    assert by_path(loop)[path].mode == 'quantize', 'as it was'


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'image': 2}, "has no argument 'image'"),
        ({'images': 0}, 'images is 0, but must be a whole number from 1 on'),
        ({'images': True}, 'images is True'),
        ({'passes': 1.5}, r'passes is 1\.5'),
        ({'theta': 0}, 'theta is 0, but must be a number above 0 and at most 1'),
        ({'theta': 1.01}, r'theta is 1\.01'),
        ({'theta': 'half'}, "theta is 'half'"),
        ({'theta': float('nan')}, 'theta is nan'),
        ({'percentiles': []}, r'percentiles is \[\], but must be a list of numbers above 0\.5'),
        ({'percentiles': [0.9, 0.5]}, r'percentiles is \[0\.9, 0\.5\]'),
        ({'percentiles': [True]}, 'percentiles is'),
        ({'percentiles': 0.9}, r'percentiles is 0\.9'),
        ({'percentiles': '0.9'}, "percentiles is '0.9'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_part(SOLVER_HOOKS, 'PerceptualClipping', **settings)
    assert '\n' not in str(error.value)


def test_settings():
    """Candidates ascend, nothing clipped comes last."""
    hook = build_part(SOLVER_HOOKS, 'PerceptualClipping', percentiles=[0.99, 0.9, 1], passes=3)
    assert hook.percentiles == [0.9, 0.99, 1.0] and hook.passes == 3
    assert PerceptualClipping().percentiles == [*PERCENTILES, 1.0]
    assert set(FILES) <= set(PREPARATION_FILES)


@pytest.mark.parametrize(
    ('wanted', 'count', 'text'),
    [
        (1, 1, 'searched on 1 image (0.png)'),
        (4, 4, 'searched on 4 images (0.png, 1.png, 2.png, 3.png)'),
        (6, 5, 'searched on 5 images, as many as have boxes (0.png, 1.png, 2.png, 3.png, ...)'),
    ],
)
def test_images_in_words(wanted, count, text):
    assert PerceptualClipping(images=wanted).describe_images([f'{i}.png' for i in range(count)]) == text


def packed(folder):
    return json.loads((folder / 'packed/manifest.json').read_text())


HOOKS = '[{type: BimodalIntegration}, {type: PerceptualClipping, passes: 1, percentiles: [0.9, 0.97, 0.99]}]'


def test_command_line(tiny, scenes, tmp_path, capsys):
    """After BIG; what is packed is what the table says, also for a run that goes on from the packed model."""
    recipe = tmp_path / 'pcc.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nbits: {{act: 4}}\nhooks: {HOOKS}\n')
    model, tables, metrics = write_pipeline(tmp_path, scenes, tiny / 'tiny.pth', ARCH), [], []
    for name in ('one', 'one --resume'):
        folder, *options = name.split()
        assert main([str(model), str(recipe), '--work-dir', str(tmp_path / folder), *options]) == 0
        tables.append(read_table(tmp_path / folder))
        metrics.append(json.loads(capsys.readouterr().out.strip().split('\n')[-1])['metrics']['quant'])
    assert tables[0] == tables[1] and metrics[0] == metrics[1]
    assert (tmp_path / 'one/clipping.png').is_file()
    logs = [log.read_text() for log in (tmp_path / 'one').rglob('*.log')]
    assert len(re.findall(r'PerceptualClipping: searched on 1 image \(.+\); 28 of 28', ''.join(logs))) == 1
    check_packed(tmp_path / 'one', tables[0])


def check_packed(folder, table, learned=False):
    """Compare the ranges of a packed model with those of a table."""
    from ptqsam.checkpoint import load_packed

    model = make_model()
    load_packed(folder / 'packed', model.sam)
    there = {q.path: q for q in act_quantizers(model.sam)}
    for path, row in table.items():
        scale, zero_point = params(row, '', there[path])
        assert torch.equal(there[path].zero_point, zero_point)
        assert torch.equal(there[path].scale, scale) or learned
    assert len(table) == 28
    return [q for path, q in there.items() if path in table]


def test_command_line_with_reconstruction(tiny, scenes, tmp_path):
    """Learning starts from the locked ranges: zero points stay, scales may move a little."""
    recipe = tmp_path / 'pcc.yaml'
    recipe.write_text(
        f'_base_: {tiny / "recipe.yaml"}\nbits: {{act: 4}}\nhooks: {HOOKS}\n'
        'rules: [{match: "role:decoder.*", quantizer: {type: LSQ}}]\n'
        'reconstruction: {iters: 4, unit: module}\n'
    )
    model = write_pipeline(tmp_path, scenes, tiny / 'tiny.pth', ARCH)
    assert main([str(model), str(recipe), '--work-dir', str(tmp_path / 'run')]) == 0
    found = check_packed(tmp_path / 'run', read_table(tmp_path / 'run'), learned=True)
    assert all(isinstance(q, LSQ) for q in found)
