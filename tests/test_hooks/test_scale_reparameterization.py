"""RepQ-ViT's scale reparameterisation: the model computes the same, one scale gives the codes of one per channel."""

import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.logging import MMLogger
from torch import nn

from ptqsam.checkpoint import load_packed, save_packed, structure
from ptqsam.cli import main
from ptqsam.config import parse_quant_config
from ptqsam.errors import ConfigError, GateError
from ptqsam.functional import quantize
from ptqsam.hooks import BimodalIntegration, ConditionNumberReduction, ScaleReparameterization
from ptqsam.hooks.scale_reparameterization import Pair, find_pairs
from ptqsam.modules import QuantNorm
from ptqsam.modules.walk import act_quantizers, original_weights, quantizers
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.solver.calibrate import calibrate_activations, calibrate_weights
from ptqsam.solver.freeze import check_gate, freeze
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.test_hooks.test_condition_number import Loader
from tests.test_projects.helpers import make_model
from tests.tiny import ALONE, ARCH, DECODER, write_pipeline

MINMAX = {'type': 'MinMax'}
# 4 tokens on a side in windows of 3, which are padded; a global block behind
PADDED = dict(ARCH, window_size=3)
TINY_VIT = dict(
    DECODER,
    encoder='tiny_vit',
    embed_dims=(16, 16, 32, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_sizes=(3, 3, 3, 3),
)
ARCHS = {'vit': ARCH, 'padded vit': PADDED, 'tiny vit': TINY_VIT}
QUANTIZED = {'vit': 4, 'padded vit': 4, 'tiny vit': 6}


@torch.no_grad()
def spread_channels(model, size=1.5, seed=0):
    """Give LayerNorms channels of very different ranges, off zero, as real ones have; and biases that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            channels = len(module.weight)
            module.weight.copy_(torch.exp(size * torch.randn(channels, generator=generator)))
            module.bias.copy_(module.weight * torch.randn(channels, generator=generator))
        elif isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.copy_(0.1 * torch.randn(len(module.bias), generator=generator))


def make_loop(tmp_path, arch=PADDED, act=4, double=False, images=2, spread=spread_channels, **recipe):
    """What the hook sees of a run: a prepared model and calibration images."""
    model = make_model(arch=arch)
    spread(model.sam.image_encoder)
    if double:
        model.sam.double()
    settings = dict(algorithm='x', bits={'weight': 4, 'act': act}, calibration={'max_boxes': 4}, **recipe)
    rules = RuleBook(parse_quant_config(settings, 'test'))
    quantize_model(model.sam, rules)
    loader = Loader([2] * images)
    if double:
        loader.batches = [dict(batch, inputs=[x.double() for x in batch['inputs']]) for batch in loader.batches]
        model.data_preprocessor.double()
    return SimpleNamespace(
        model=model, target=model.sam, calib_loader=loader, recipe=rules.config, rules=rules, work_dir=tmp_path, **ALONE
    )


def run_hook(loop, hook=None):
    """Run a hook, the reparameterisation unless another is given."""
    runner = SimpleNamespace(test_loop=loop, logger=MMLogger.get_instance('repq'))
    (hook or ScaleReparameterization()).before_calibrate(runner)


@torch.no_grad()
def embed(loop, mode='off', **kwargs):
    """Embedding of an image that was not seen before; all quantizers are off, or the locked ones in another mode."""
    for quantizer in quantizers(loop.target):
        quantizer.mode = mode if quantizer.locked else 'off'
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(9), **kwargs)
    return loop.model.encode(image)


@pytest.mark.parametrize('name', ARCHS)
@pytest.mark.parametrize('observer', [None, MINMAX])
def test_float_model_computes_the_same(name, observer, tmp_path):
    loop = make_loop(tmp_path, ARCHS[name], double=True)
    before = embed(loop, dtype=torch.float64)
    run_hook(loop, ScaleReparameterization(observer))
    locked = [quantizer for quantizer in quantizers(loop.target) if quantizer.locked]
    assert len(locked) == QUANTIZED[name] and all(q.mode == 'quantize' for q in locked)
    after = embed(loop, dtype=torch.float64)
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    assert not torch.equal(after, before)
    single = make_loop(tmp_path, ARCHS[name])
    before = embed(single)
    run_hook(single, ScaleReparameterization(observer))
    assert (embed(single) - before).abs().max() <= 1e-4 * before.abs().max()
    assert (embed(single, 'quantize') - before).abs().max() > 1e-3 * before.abs().max()
    assert not any(p.requires_grad for p in single.target.parameters())
    assert not any(module._forward_pre_hooks for module in single.target.modules())


def test_a_shift_where_zeros_are_padded_would_change_the_model(tmp_path, monkeypatch):
    """What the released ports do; without padding it would be right."""
    monkeypatch.setattr('ptqsam.hooks.scale_reparameterization.Pair.shifts', True)
    for name, changes in {'vit': False, 'padded vit': True, 'tiny vit': False}.items():
        loop = make_loop(tmp_path, ARCHS[name], double=True)
        before = embed(loop, dtype=torch.float64)
        run_hook(loop)
        change = (embed(loop, dtype=torch.float64) - before).abs().max() / before.abs().max()
        assert (change > 1e-3) if changes else (change < 1e-10), name


def test_windows_keep_the_bias_and_zero(tmp_path):
    loop = make_loop(tmp_path)
    windowed, whole = (loop.target.image_encoder.blocks[i] for i in range(2))
    assert windowed.window_size == 3 and whole.window_size == 0
    bias = [block.attn.qkv.bias.clone() for block in (windowed, whole)]
    run_hook(loop)
    assert torch.equal(windowed.attn.qkv.bias, bias[0]) and not torch.equal(whole.attn.qkv.bias, bias[1])
    quantizer = windowed.attn.qkv.input_quantizer
    assert quantizer(torch.zeros(3)).eq(0).all()
    assert len({p.shifts for p in find_pairs(make_loop(tmp_path).target)}) == 2


def inputs_of(loop, pairs):
    """What reaches the layers of some pairs, all quantizers off."""
    inputs = []
    handles = [pair.op.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone())) for pair in pairs]
    embed(loop)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize('kind', ['Uniform', 'LSQ'])
@pytest.mark.parametrize(('name', 'bits'), [('padded vit', 4), ('tiny vit', 8)])
def test_codes_are_those_of_a_grid_per_channel(name, bits, kind, tmp_path, monkeypatch):
    """Bit for bit but for values within rounding noise of a tie, which float32 has to move."""
    rules = [{'match': ['role:*.qkv.input', 'role:mlp.*.input'], 'quantizer': {'type': kind}}]
    loop = make_loop(tmp_path, ARCHS[name], act=bits, rules=rules)
    pairs, grids, choose = find_pairs(loop.target), [], Pair.grids
    assert len(pairs) == QUANTIZED[name] and {type(pair.quantizer).__name__ for pair in pairs} == {kind}
    monkeypatch.setattr(Pair, 'grids', lambda *args: grids.append(choose(*args)) or grids[-1])
    plain = inputs_of(loop, pairs)
    run_hook(loop)
    for pair, grid, x, x_moved in zip(pairs, grids, plain, inputs_of(loop, pairs), strict=True):
        quantizer = pair.quantizer
        assert torch.equal(quantizer.scale.detach(), grid.scale) and torch.equal(quantizer.zero_point, grid.zero_point)
        assert quantizer.qmin <= grid.zero_point <= quantizer.qmax
        scale, zero = grid.scales.float(), grid.zero_points.int()
        expected = quantize(x, scale, zero, quantizer.qmin, quantizer.qmax, ch_axis=-1)
        codes = quantizer.encode(x_moved)
        off = (codes - expected).abs()
        assert off.max() <= 1 and off.sum() <= max(1, 1e-4 * off.numel())
        assert len(codes.unique()) > 2 ** (bits - 1)
        back = (quantizer.decode(codes).double() * grid.ratio - grid.shift)[off == 0]
        wanted = ((expected - zero) * grid.scales)[off == 0]
        torch.testing.assert_close(back, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize('dead', [0.0, 5.0])
@pytest.mark.parametrize('padded', [False, True])
def test_dead_channels(dead, padded, tmp_path):
    """Channels that are always 0, or always the same: finite parameters, same function, also if they come to life."""

    def kill(encoder):
        spread_channels(encoder)
        with torch.no_grad():
            for module in encoder.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight[:3], module.bias[:3] = 0, dead

    loop = make_loop(tmp_path, PADDED if padded else ARCH, spread=kill)
    before = embed(loop)
    run_hook(loop, ScaleReparameterization(MINMAX))
    assert all(torch.isfinite(p).all() for p in loop.target.parameters())
    assert (embed(loop) - before).abs().max() <= 1e-4 * before.abs().max()
    assert (embed(loop, 'quantize') - before).abs().max() < 0.5 * before.abs().max()


def test_the_float_model_keeps_its_parameters(tmp_path):
    """Norms of SAM's blocks are the float model's own modules, and so are those of a wrapped norm."""
    for arch, rules in ((PADDED, []), (PADDED, [{'match': 'role:norm.input', 'enabled': True}]), (TINY_VIT, [])):
        loop = make_loop(tmp_path, arch, rules=rules)
        pairs = find_pairs(loop.target)
        assert bool(rules) == all(isinstance(pair.owner, QuantNorm) for pair in pairs)
        shared = [(p, p.clone()) for pair in pairs for m in (pair.norm, pair.op) for p in m.parameters(recurse=False)]
        norms = [pair.norm for pair in pairs]
        assert len(shared) == 4 * len(pairs)
        names = list(loop.target.state_dict())
        before = embed(loop)
        run_hook(loop)
        assert all(torch.equal(p, value) for p, value in shared)
        assert not any(pair.norm is norm for pair, norm in zip(pairs, norms, strict=True))
        assert [name for name in loop.target.state_dict() if 'scale' not in name] == [
            name for name in names if 'scale' not in name
        ]
        assert (embed(loop) - before).abs().max() <= 1e-4 * before.abs().max()


@pytest.mark.parametrize('absent', ['norm', 'layer'])
def test_without_a_bias_there_is_no_shift(absent, tmp_path):
    """A new bias would be a tensor that the float model, which a packed checkpoint is loaded into, does not have."""
    loop = make_loop(tmp_path, ARCH, double=True)
    for pair in find_pairs(loop.target):
        (pair.norm if absent == 'norm' else pair.op).bias = None
    before = embed(loop, dtype=torch.float64)
    run_hook(loop)
    assert (embed(loop, dtype=torch.float64) - before).abs().max() <= 1e-10 * before.abs().max()


def test_calibration_keeps_what_is_locked(tmp_path):
    loop = make_loop(tmp_path)
    run_hook(loop)
    locked = {q.path: (q.scale.clone(), q.zero_point.clone()) for q in act_quantizers(loop.target) if q.locked}
    calibrate_activations(loop.model, loop.target, loop.calib_loader, 4, 0)
    for quantizer in act_quantizers(loop.target):
        assert quantizer.mode == 'quantize' and quantizer.calibrated
        if quantizer.path in locked:
            assert all(map(torch.equal, (quantizer.scale, quantizer.zero_point), locked[quantizer.path]))
    assert set(locked) == {f'image_encoder.blocks.{i}.{x}.input' for i in range(2) for x in ('attn.qkv', 'mlp.lin1')}


def test_ranges_are_those_of_the_float_model(tmp_path):
    """Also if another hook has locked a quantizer in front."""
    plain, loop = make_loop(tmp_path), make_loop(tmp_path)
    other = loop.target.image_encoder.blocks[0].mlp.lin2.input_quantizer
    other.lock(torch.tensor(-1e-3), torch.tensor(1e-3))
    for one in (plain, loop):
        run_hook(one)
    assert other.locked and other.mode == 'quantize'
    expected = {q.path: q.scale for q in act_quantizers(plain.target) if q.locked}
    found = {q.path: q.scale for q in act_quantizers(loop.target) if q.locked and q is not other}
    assert found == expected and len(found) == 4


@pytest.mark.parametrize('first', [True, False])
def test_composes_with_bimodal_integration(first, tmp_path):
    loop = make_loop(tmp_path, double=False)

    @torch.no_grad()
    def logits():
        embedding = embed(loop)
        return loop.model.decode_logits(embedding, torch.tensor([[4.0, 5.0, 40.0, 50.0]]))[0]

    with torch.no_grad():
        projection = loop.target.mask_decoder.transformer.layers[0].cross_attn_token_to_image.k_proj
        projection.bias += 6 * torch.where(torch.arange(len(projection.bias)) % 2 == 0, -1.0, 1.0)
    before = logits()
    hooks = [ScaleReparameterization(), BimodalIntegration()]
    for hook in hooks if first else hooks[::-1]:
        run_hook(loop, hook)
    report = json.loads((tmp_path / 'big.json').read_text())['attentions']
    assert next(iter(report.values()))['flipped'] > 0
    assert sum(q.locked for q in quantizers(loop.target)) == 4
    assert (logits() - before).abs().max() <= 1e-4 * before.abs().max()


def test_composes_with_condition_numbers(tmp_path, monkeypatch):
    """The float model stays reachable through the original weights."""
    monkeypatch.setattr('ptqsam.hooks.condition_number.plot_conditions', lambda *_: None)
    loop = make_loop(tmp_path)
    before = embed(loop)
    for hook in (ConditionNumberReduction(threshold=2.0), ScaleReparameterization()):
        run_hook(loop, hook)
    pairs = [p.op for p in find_pairs(make_loop(tmp_path).target)]
    assert len(pairs) == sum(q.locked for q in quantizers(loop.target)) == 4
    changed = [m for m in loop.target.image_encoder.modules() if getattr(m, 'original', None) is not None]
    assert changed and (embed(loop) - before).abs().max() > 1e-3 * before.abs().max()
    with original_weights(loop.target):
        assert (embed(loop) - before).abs().max() <= 1e-4 * before.abs().max()


def test_images_of_other_processes_count(tmp_path, monkeypatch):
    """Ranges are synchronised before they are chosen."""
    seen = []
    monkeypatch.setattr(
        'ptqsam.hooks.scale_reparameterization.ChannelStatistics.synchronize', lambda self: seen.append(self.count)
    )
    run_hook(make_loop(tmp_path, images=3))
    assert seen == [3] * 4


def test_nan_names_the_layer(tmp_path):
    loop = make_loop(tmp_path)
    loop.target.image_encoder.blocks[1].norm2.bias.data[3] = torch.nan
    with pytest.raises(GateError, match=r'image_encoder\.blocks\.1\.mlp\.lin1\.input: saw NaN or infinity'):
        run_hook(loop)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'observe': MINMAX}, "no argument 'observe'"),
        ({'observer': 'MinMax'}, "observer is 'MinMax', but must be the config of one"),
        ({'observer': {}}, 'observer is {}'),
        ({'observer': {'type': 'MinMacks'}}, "unknown observer 'MinMacks' .*MinMax"),
        ({'observer': {'type': 'MinMax', 'bits': 3}}, 'bits, symmetric and ch_axis are those of the quantizer'),
        ({'observer': {'type': 'Percentile', 'percentile': 0.2}}, 'Percentile: 0.2 is not within'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_part(SOLVER_HOOKS, 'ScaleReparameterization', **settings)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'rule',
    [
        {'match': 'image_encoder.*', 'enabled': False},
        {'match': ['role:*.qkv.input', 'role:mlp.lin1.input'], 'quantizer': {'type': 'CAG'}},
        {'match': ['role:*.qkv.input', 'role:mlp.lin1.input'], 'quantizer': {'type': 'Uniform', 'ch_axis': -1}},
    ],
)
def test_nothing_to_do(rule, tmp_path):
    loop = make_loop(tmp_path, rules=[rule])
    with pytest.raises(ConfigError, match='no linear layer behind a LayerNorm of the encoder'):
        ScaleReparameterization().check(loop.target, loop.rules.choices)
    with pytest.raises(ConfigError, match='leave the hook out'):
        run_hook(loop)


def test_table_knows_every_layer_norm_of_the_encoders():
    """And in each class that it names, the layer is the only reader of the norm: others see no difference."""
    for arch in ARCHS.values():
        model = make_model(arch=arch)
        norms = [m for m in model.sam.image_encoder.modules() if isinstance(m, nn.LayerNorm)]
        quantize_model(
            model.sam, RuleBook(parse_quant_config({'algorithm': 'x', 'bits': {'weight': 4, 'act': 4}}, 't'))
        )
        assert [id(pair.norm) for pair in find_pairs(model.sam)] == [id(norm) for norm in norms]


def test_a_packed_model_is_the_same_bit_for_bit(tmp_path):
    loop, fresh = make_loop(tmp_path), make_model(seed=1, arch=PADDED)
    run_hook(loop)
    calibrate_activations(loop.model, loop.target, loop.calib_loader, 4, 0)
    calibrate_weights(loop.target)
    freeze(loop.target)
    check_gate(loop.target, loop.rules.enabled)
    save_packed(tmp_path / 'packed', loop.target, structure(fresh.sam), loop.recipe.plain(), {}, {})
    load_packed(tmp_path / 'packed', fresh.sam)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fresh.encode(image), loop.model.encode(image))


def test_command_line(tiny, scenes, tmp_path, capsys):
    """Where channels differ it beats one scale; the dry run knows it; what was packed is what was run."""
    state = torch.load(tiny / 'tiny.pth', weights_only=True)
    model = make_model()
    model.sam.load_state_dict(state)
    spread_channels(model.sam.image_encoder)
    torch.save(model.sam.state_dict(), tmp_path / 'spread.pth')
    config = write_pipeline(tmp_path, scenes, tmp_path / 'spread.pth', ARCH)
    recipe = tmp_path / 'repq.yaml'
    recipe.write_text(
        f'_base_: {tiny / "recipe.yaml"}\nbits: {{weight: 8, act: 4}}\nhooks: [{{type: ScaleReparameterization}}]\n'
    )
    assert main([str(config), str(recipe), '--dry-run']) == 0
    assert 'ScaleReparameterization' in capsys.readouterr().out
    errors = {}
    for name, options in {'repq': [], 'without': ['--quant-options', 'hooks=[]']}.items():
        work_dir = tmp_path / name
        assert main([str(config), str(recipe), '--eval-fp', '--work-dir', str(work_dir), *options]) == 0
        errors[name] = json.loads((work_dir / 'packed/manifest.json').read_text())['errors']
    (log,) = (tmp_path / 'repq').rglob('*.log')
    assert log.read_text().count('ScaleReparameterization: 4 layers') == 1
    for path in ('image_encoder.blocks.0.attn.qkv.input', 'image_encoder.blocks.1.mlp.lin1.input'):
        assert errors['repq'][path]['sqnr'] > errors['without'][path]['sqnr'] + 1
    results = {name: json.loads((tmp_path / name / 'result.json').read_text())['metrics'] for name in errors}
    assert results['repq']['fp'] == results['without']['fp']

    capsys.readouterr()
    assert main([str(config), str(recipe), '--work-dir', str(tmp_path / 'repq'), '--resume']) == 0
    resumed = json.loads(capsys.readouterr().out.strip().split('\n')[-1])
    assert resumed['metrics']['quant'] == results['repq']['quant']
