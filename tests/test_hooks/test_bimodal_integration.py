"""BIG on models: golden absorption, planted modes are found and undone, the float model computes the same."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import MMLogger
from segment_anything.modeling import transformer
from torch import nn

from ptqsam.cli import main
from ptqsam.config import parse_quant_config
from ptqsam.errors import ConfigError, GateError
from ptqsam.hooks import BimodalIntegration
from ptqsam.hooks.bimodal_integration import absorb_signs, bimodality, channel_signs
from ptqsam.modules import QuantLinear
from ptqsam.modules.walk import act_quantizers
from ptqsam.observers import AvgMinMax, AvgMSEFast
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.golden import Case, cases
from tests.test_projects.helpers import instances, make_model, make_sample, random_boxes
from tests.tiny import ALONE, ARCH, write_pipeline

CROSS = 'mask_decoder.transformer.layers.{}.cross_attn_token_to_image'
PATHS = [CROSS.format(0), CROSS.format(1), 'mask_decoder.transformer.final_attn_token_to_image']
BITS = {'algorithm': 'x', 'bits': {'weight': 4, 'act': 4}}


def plant(state, size=6.0):
    """Add +-size to the channels of k in the first two token-to-image attentions, where softmax does not see it."""
    for path in PATHS[:2]:
        bias = state[f'{path}.k_proj.bias']
        bias += size * torch.where(torch.arange(len(bias)) % 2 == 0, -1.0, 1.0)


def make_loop(tmp_path, counts=(3, 2), planted=True, recipe=BITS):
    """What the hook sees of a run: a prepared model and calibration images with so many boxes."""
    model = make_model()
    if planted:
        plant(model.sam.state_dict())
    rules = RuleBook(parse_quant_config(recipe, 'test'))
    quantize_model(model.sam, rules)
    rng = np.random.default_rng(0)
    batches = []
    for index, count in enumerate(counts):
        meta = dict(img_path=f'{index}.png', ori_shape=(64, 64), img_shape=(64, 64), scale_factor=(1.0, 1.0))
        sample = make_sample(instances(random_boxes(count, 64, 64, seed=index)), **meta)
        image = torch.from_numpy(rng.integers(0, 256, (3, 64, 64), dtype=np.uint8))
        batches.append(dict(inputs=[image], data_samples=[sample]))
    return SimpleNamespace(
        model=model,
        target=model.sam,
        calib_loader=batches,
        recipe=rules.config,
        rules=rules,
        work_dir=tmp_path,
        **ALONE,
    )


def run_hook(loop, **settings):
    """Run the hook; its report."""
    runner = SimpleNamespace(test_loop=loop, logger=MMLogger.get_instance('big'))
    BimodalIntegration(**settings).before_calibrate(runner)
    return json.loads((loop.work_dir / 'big.json').read_text())


@torch.no_grad()
def outputs(loop):
    """Logits for some boxes, and k of the token-to-image attentions."""
    keys = []
    handles = [
        loop.target.get_submodule(f'{path}.k').register_forward_pre_hook(lambda _, args: keys.append(args[0]))
        for path in PATHS
    ]
    generator = torch.Generator().manual_seed(0)
    embedding = loop.model.encode(torch.randn(1, 3, 64, 64, generator=generator))
    logits, iou = loop.model.sam.decode(embedding, random_boxes(3, 64, 64), None, True)
    for handle in handles:
        handle.remove()
    return logits, iou, keys


@pytest.mark.parametrize('entry', cases('08_big_absorb'))
def test_golden_absorption(entry):
    case = Case(entry)
    p = case.parameters
    attention = transformer.Attention(p['embedding_dim'], p['num_heads'], p['downsample_rate'])
    names = {name: name.replace('_proj_', '_proj.') for name in case.inputs if '_proj_' in name}
    attention.load_state_dict({ours: torch.from_numpy(case.inputs[name]) for name, ours in names.items()})
    q, k, v = (torch.from_numpy(case.inputs[f'{name}_in']) for name in 'qkv')

    def logits(attention, q, k):
        heads = (attention._separate_heads(x, p['num_heads']) for x in (attention.q_proj(q), attention.k_proj(k)))
        return torch.einsum('bhic,bhjc->bhij', *heads) / math.sqrt(attention.internal_dim / p['num_heads'])

    with torch.no_grad():
        before = attention.k_proj(k)
        exact = copy.deepcopy(attention).double()
        logits_before = logits(exact, q.double(), k.double())
        case.check('k_before', before)
        case.check('is_bimodal', bimodality(before[0]).bimodal)
        signs = channel_signs(before.mean((0, 1)))
        case.check('sign', signs)
        absorb_signs(attention, signs)
        for name in ('q_proj', 'k_proj'):
            case.check(f'{name[0]}_weight_after', attention.get_submodule(name).weight)
            case.check(f'{name[0]}_bias_after', attention.get_submodule(name).bias)
        after = attention.k_proj(k)
        case.check('k_after', after)
        case.check('logits', logits(attention, q, k))
        case.check('output', attention(q, k, v))
        absorb_signs(exact, signs)
        assert (logits(exact, q.double(), k.double()) - logits_before).abs().max() < 1e-10
    assert (after.mean((0, 1)) >= 0).all()
    assert not bimodality(after[0]).bimodal


def test_planted_modes_are_found_and_undone(tmp_path):
    loop = make_loop(tmp_path)
    parameters = {name: p.clone() for name, p in loop.target.named_parameters()}
    logits, iou, keys = outputs(loop)
    report = run_hook(loop)
    assert report['images'] == ['0.png'] and list(report['attentions']) == PATHS
    decisions = report['attentions']
    assert [decisions[path]['bimodal'] for path in PATHS] == [True, True, False]
    assert [decisions[path]['flipped'] for path in PATHS] == [4, 4, 0], 'every second of 8 channels'
    assert np.allclose(decisions[PATHS[0]]['peaks'], [-6, 6], atol=1.5)
    logits_after, iou_after, keys_after = outputs(loop)
    assert torch.equal(logits_after, logits) and torch.equal(iou_after, iou)
    for before, after in zip(keys[:2], keys_after[:2], strict=True):
        assert torch.equal(after.abs(), before.abs()) and after.min() > 0 > before.min()
        assert (after.mean((0, 1)) >= 0).all()
    changed = {name for name, p in loop.target.named_parameters() if not torch.equal(p, parameters[name])}
    names = [f'{path}.{name}.weight' for path in PATHS[:2] for name in ('q_proj', 'k_proj')]
    assert {name for name in changed if name.endswith('weight')} == set(names)
    assert changed - set(names) <= {name.replace('weight', 'bias') for name in names}
    assert not any(p.requires_grad for p in loop.target.parameters())
    assert not any(module._forward_pre_hooks for module in loop.target.modules())
    assert sorted(path.name for path in tmp_path.iterdir()) == ['big.json', 'big.png']


def test_planting_leaves_the_float_model_as_it_is(tmp_path):
    planted, plain = (outputs(make_loop(tmp_path, planted=planted))[0] for planted in (True, False))
    assert (planted - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_without_two_modes_nothing_changes(tmp_path):
    loop = make_loop(tmp_path, planted=False)
    parameters = dict(loop.target.named_parameters())
    values = {name: p.clone() for name, p in parameters.items()}
    report = run_hook(loop)
    assert not any(decision['bimodal'] or decision['flipped'] for decision in report['attentions'].values())
    for name, p in loop.target.named_parameters():
        assert p is parameters[name] and torch.equal(p, values[name])


def test_the_float_model_keeps_its_parameters(tmp_path):
    """Also where a projection is left out of quantization, and so is the float model's own module."""
    recipe = BITS | {'rules': [{'match': f'{PATHS[0]}.k_proj.*', 'enabled': False}]}
    loop = make_loop(tmp_path, recipe=recipe)
    attention = loop.target.get_submodule(PATHS[0])
    shared = {name: attention.get_submodule(name) for name in ('q_proj', 'k_proj')}
    assert isinstance(shared['q_proj'], QuantLinear) and type(shared['k_proj']) is nn.Linear
    weights = {name: (module.weight, module.weight.clone()) for name, module in shared.items()}
    logits, _, _ = outputs(loop)
    assert run_hook(loop)['attentions'][PATHS[0]]['flipped'] == 4
    assert torch.equal(outputs(loop)[0], logits)
    for weight, value in weights.values():
        assert torch.equal(weight, value)
    assert shared['k_proj'].weight is weights['k_proj'][0]


def test_locked_quantizers_do_not_count(tmp_path):
    """k is looked at in the float model, whatever other hooks have locked; what was locked stays on."""
    loop, plain = make_loop(tmp_path), make_loop(tmp_path)
    quantizers = act_quantizers(loop.target)
    locked = [quantizer for quantizer in quantizers if quantizer.path.endswith(('qkv.input', f'{PATHS[0]}.k'))]
    for quantizer in locked:
        quantizer.lock(torch.tensor(-1e-3), torch.tensor(1e-3))
    assert len(locked) > 1 and not torch.equal(outputs(loop)[0], outputs(plain)[0])
    assert run_hook(loop) == run_hook(plain)
    assert all(quantizer.mode == ('quantize' if quantizer in locked else 'off') for quantizer in quantizers)
    for ours, theirs in zip(loop.target.parameters(), plain.target.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_another_process_takes_what_the_main_one_found(tmp_path, monkeypatch):
    first, other = make_loop(tmp_path), make_loop(tmp_path / 'other', counts=(0,))
    found = []
    monkeypatch.setattr('ptqsam.distributed.broadcast_object_list', lambda data: found.extend(data))
    run_hook(first)
    monkeypatch.setattr('ptqsam.distributed.broadcast_object_list', lambda data: data.__setitem__(slice(None), found))
    for module in ('distributed', 'hooks.bimodal_integration'):
        monkeypatch.setattr(f'ptqsam.{module}.is_main_process', lambda: False)
    BimodalIntegration().before_calibrate(SimpleNamespace(test_loop=other, logger=MMLogger.get_instance('big')))
    assert not (tmp_path / 'other').exists()
    for ours, theirs in zip(first.target.parameters(), other.target.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_k_left_out_of_quantization(tmp_path):
    loop = make_loop(tmp_path, recipe=BITS | {'rules': [{'match': 'role:*.k', 'enabled': False}]})
    logits, _, _ = outputs(loop)
    assert run_hook(loop)['attentions'][PATHS[0]]['bimodal']
    assert torch.equal(outputs(loop)[0], logits)


def test_images_without_boxes_do_not_count(tmp_path):
    assert run_hook(make_loop(tmp_path, counts=(0, 2, 3)))['images'] == ['1.png']
    report = run_hook(make_loop(tmp_path, counts=(2, 0, 30, 1)), images=2)
    assert report['images'] == ['0.png', '2.png'] and report['attentions'][PATHS[0]]['bimodal']
    with pytest.raises(ConfigError, match='no calibration image has a prompt box'):
        run_hook(make_loop(tmp_path, counts=(0, 0)))


def test_density_is_of_the_first_prompt_and_signs_are_of_all(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        'ptqsam.hooks.bimodal_integration.bimodality', lambda x, **_: seen.append(x.clone()) or bimodality(x)
    )
    loop = make_loop(tmp_path, counts=(3,))
    keys = []
    quantizer = loop.target.get_submodule(f'{PATHS[0]}.k')
    quantizer.register_forward_pre_hook(lambda _, args: keys.append(args[0].clone()))
    run_hook(loop)
    assert keys[0].shape == (3, 16, 8)
    assert torch.equal(seen[0], keys[0][0])
    assert torch.equal(seen[1], keys[0][0] * channel_signs(keys[0].mean((0, 1))))


def test_nan_names_attention_and_image(tmp_path, monkeypatch):
    loop = make_loop(tmp_path)
    loop.target.get_submodule(PATHS[1]).k_proj.bias[3] = torch.nan
    # not the whole model, which refuses such masks itself
    embedding, boxes = loop.model.encode(torch.zeros(1, 3, 64, 64)), random_boxes(2, 64, 64)
    monkeypatch.setattr(loop.model, 'test_step', lambda batch: loop.model.sam.decode(embedding, boxes, None, True))
    with pytest.raises(GateError, match=rf'{PATHS[1]}\.k: NaN or infinity on image 0\.png'):
        run_hook(loop)


def test_observers_change_only_for_compatibility(tmp_path):
    loop = make_loop(tmp_path)
    run_hook(loop)
    assert all(type(q.observer) is AvgMinMax for q in act_quantizers(loop.target))
    loop = make_loop(
        tmp_path, recipe=BITS | {'compat': {'big_observer': True}, 'hooks': [{'type': 'BimodalIntegration'}]}
    )
    run_hook(loop)
    changed = {q.path for q in act_quantizers(loop.target) if type(q.observer) is AvgMSEFast}
    expected = {
        c.point.path for c in loop.rules.enabled if c.point.role.startswith('decoder.') and c.point.path[-1] == 'k'
    }
    assert changed == expected and len(changed) == 7


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'pointz': 64}, 'pointz'),
        ({'points': 7}, 'points is 7, but must be a whole number from 8 on'),
        ({'points': True}, 'points is True'),
        ({'images': 0}, 'images is 0'),
        ({'images': 1.5}, r'images is 1\.5'),
        ({'min_distance': 0}, 'min_distance is 0'),
        ({'min_height': -0.1}, r'min_height is -0\.1, but must be a number from 0 to 1'),
        ({'min_height': 'low'}, "min_height is 'low'"),
        ({'percentile': 0.5}, r'percentile is 0\.5, but must be null, or above 0\.5 and at most 1'),
        ({'percentile': float('nan')}, 'percentile is nan'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_part(SOLVER_HOOKS, 'BimodalIntegration', **settings)
    assert '\n' not in str(error.value)


def test_without_token_to_image_attention(tmp_path):
    recipe = BITS | {'rules': [{'match': 'mask_decoder.*', 'enabled': False}]}
    with pytest.raises(ConfigError, match=r"quantizes nothing in attentions of role 'decoder\.token_to_image'"):
        run_hook(make_loop(tmp_path, recipe=recipe))


def test_command_line(tiny, scenes, tmp_path, capsys):
    """On a planted model BIG restores what the planted modes cost, and nothing in the float model."""
    state = torch.load(tiny / 'tiny.pth', weights_only=True)
    plant(state)
    torch.save(state, tmp_path / 'planted.pth')
    model = write_pipeline(tmp_path, scenes, tmp_path / 'planted.pth', ARCH)
    recipe = tmp_path / 'big.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nbits: {{act: 4}}\nhooks: [{{type: BimodalIntegration}}]\n')
    manifests = {}
    for name, options in {'big': [], 'without': ['--quant-options', 'hooks=[]']}.items():
        work_dir = tmp_path / name
        assert main([str(model), str(recipe), '--eval-fp', '--work-dir', str(work_dir), *options]) == 0
        manifests[name] = json.loads((work_dir / 'packed/manifest.json').read_text())
    (log,) = (tmp_path / 'big').rglob('*.log')
    assert log.read_text().count('BimodalIntegration: mask_decoder') == 3
    assert (tmp_path / 'big/big.png').is_file() and not (tmp_path / 'without/big.json').exists()
    for path in PATHS[:2]:
        with_big, without = (manifests[name]['errors'][f'{path}.k']['sqnr'] for name in ('big', 'without'))
        assert with_big > without + 4, 'half the range, about 6 dB'
    results = {name: json.loads((tmp_path / name / 'result.json').read_text())['metrics'] for name in manifests}
    assert results['big']['fp'] == results['without']['fp']

    capsys.readouterr()
    assert main([str(model), str(recipe), '--work-dir', str(tmp_path / 'big'), '--resume']) == 0
    resumed = json.loads(capsys.readouterr().out.strip().split('\n')[-1])
    assert resumed['metrics']['quant'] == results['big']['quant']


@pytest.mark.parametrize(('settings', 'message'), [('points: 4', 'points is 4'), ('point: 64', "argument 'point'")])
def test_command_line_refuses_bad_settings(settings, message, tiny, tmp_path, capsys):
    recipe = tmp_path / 'bad.yaml'
    recipe.write_text(f'_base_: {tiny / "recipe.yaml"}\nhooks: [{{type: BimodalIntegration, {settings}}}]\n')
    assert main([str(tiny / 'tiny.py'), str(recipe), '--work-dir', str(tmp_path / 'bad')]) == 2
    errors = [line for line in capsys.readouterr().err.split('\n') if line.startswith('error: ')]
    assert len(errors) == 1 and message in errors[0]
