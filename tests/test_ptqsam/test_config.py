"""The recipe schema: inheritance, overrides, and one clear line for every mistake."""

import json
import math

import pytest
import yaml
from mmengine.config import Config

from ptqsam.cli import parse_args
from ptqsam.config import PRESETS, load_quant_config, parse_quant_config
from ptqsam.config.files import LIST_ADVICE
from ptqsam.errors import ConfigError
from tests.tiny import ROOT

BITS = {'weight': 4, 'act': 8}
GOOD = {'algorithm': 'x', 'bits': BITS}


def test_defaults_and_types():
    config = parse_quant_config(GOOD | {'rules': [{'match': '*', 'bits': 6}]}, 'here')
    assert (config.bits.weight, config.bits.act) == (4, 8)
    assert config.calibration.num_images == 32
    assert config.calibration.observer.act.type == 'AvgMinMax'
    assert config.rules[0].bits == 6 and config.rules[0].enabled is None
    assert parse_quant_config(config.plain(), 'again') == config


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'algoritm': 'x'}, "unknown key 'algoritm' (did you mean 'algorithm'?)"),
        ({'calibration': {'num_image': 2}}, "'calibration.num_image' (did you mean 'num_images'?)"),
        (
            {'calibration': {'observer': {'foo': {'type': 'MSE'}}}},
            "'calibration.observer.foo' (known keys: weight, act)",
        ),
        ({'rules': [{'match': '*', 'quantiser': {'type': 'LSQ'}}]}, "'rules.0.quantiser' (did you mean 'quantizer'?)"),
        ({'compat': {'soft_weight': True}}, "unknown key 'compat.soft_weight' (did you mean 'soft_weights'?)"),
        ({'compat': {'old': True}}, "unknown key 'compat.old' (known keys: keep_drop_prob, soft_weights, "),
        ({'compat': {'soft_weights': 1}}, "key 'compat.soft_weights': input should be a valid boolean, got 1"),
        ({'compat': ['soft_weights']}, "key 'compat'"),
        ({'bits': {'weight': 1, 'act': 8}}, "key 'bits.weight': input should be greater than or equal to 2, got 1"),
        ({'bits': {'weight': 4, 'act': 9}}, "key 'bits.act': input should be less than or equal to 8, got 9"),
        ({'bits': {'weight': '4', 'act': 8}}, "key 'bits.weight': input should be a valid integer, got '4'"),
        ({'bits': {'weight': 4.0, 'act': 8}}, "key 'bits.weight'"),
        ({'bits': {'weight': 4}}, "key 'bits.act' is missing"),
        ({'bits': BITS | {'decoder': {}}}, "key 'bits.decoder': the section is empty; give weight or act"),
        ({'bits': BITS | {'encoder': {'act': None}}}, "key 'bits.encoder': the section is empty"),
        ({'bits': BITS | {'decoder': {'act': 9}}}, "key 'bits.decoder.act': input should be less than or equal to 8"),
        ({'bits': BITS | {'decoder': {'acts': 8}}}, "unknown key 'bits.decoder.acts' (did you mean 'act'?)"),
        ({'bits': BITS | {'neck': {'act': 8}}}, "unknown key 'bits.neck' (known keys: weight, act, encoder, decoder)"),
        ({'bits': BITS | {'decoder': 8}}, "key 'bits.decoder': input should be a valid dictionary, got 8"),
        ({'rules': [{'match': '*', 'bits': 16}]}, "key 'rules.0.bits'"),
        ({'rules': {'match': '*'}}, "key 'rules'"),
        ({'rules': [{'match': [], 'bits': 4}]}, "key 'rules.0.match' is empty; name at least one glob"),
        ({'rules': [{'match': 5, 'bits': 4}]}, "key 'rules.0.match'"),
        ({'rules': [{'match': ['*', 5], 'bits': 4}]}, "key 'rules.0.match.1': input should be a valid string, got 5"),
        ({'compat': {'beta_multiplier': 0}}, "key 'compat.beta_multiplier': input should be greater than 0, got 0"),
        ({'rules': [{'match': '*'}]}, 'the rule has no effect'),
        ({'rules': [{'match': '*', 'quantizer': {'type': 'LSQ', 'bits': 8}}]}, "'bits' of LSQ belongs to the rule"),
        ({'rules': [{'match': '*', 'observer': {'type': 'MSE', 'ch_axis': 0}}]}, 'belongs to the quantizer'),
        ({'calibration': {'seed': -1}}, "key 'calibration.seed'"),
        ({'calibration': {'num_images': 0}}, "key 'calibration.num_images'"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    with pytest.raises(ConfigError) as info:
        parse_quant_config(GOOD | change, 'exp/x.yaml')
    assert str(info.value).startswith('exp/x.yaml: ')
    assert message in str(info.value)
    assert '\n' not in str(info.value)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'presett': 'fast'}, "unknown key 'reconstruction.presett' (did you mean 'preset'?)"),
        ({'iter': 3}, "unknown key 'reconstruction.iter' (did you mean 'iters'?)"),
        ({'cache': {'stor': 'disk'}}, "unknown key 'reconstruction.cache.stor' (did you mean 'store'?)"),
        (
            {'preset': 'slow'},
            "key 'reconstruction.preset': input should be 'paper', 'fast', 'paper_saq' or 'fast_stage', got 'slow'",
        ),
        ({'preset': ['fast']}, "key 'reconstruction.preset'"),
        ({'preset': None}, "key 'reconstruction.preset'"),
        (
            {'unit': 'blok'},
            "key 'reconstruction.unit': input should be 'layer', 'module', 'block' or 'stage', got 'blok'",
        ),
        ({'drop_prob': 0}, "key 'reconstruction.drop_prob': input should be greater than 0, got 0"),
        ({'drop_prob': 1.1}, "key 'reconstruction.drop_prob'"),
        ({'b_range': [2, 20]}, "key 'reconstruction.b_range': the exponent has to fall"),
        ({'b_range': [20, 0.5]}, "key 'reconstruction.b_range': the exponent has to fall"),
        ({'b_range': [20]}, "key 'reconstruction.b_range.1' is missing"),
        ({'b_range': [20, 9, 2]}, "key 'reconstruction.b_range'"),
        ({'b_range': 20}, "key 'reconstruction.b_range': input should be a valid list, got 20"),
        ({'b_range': ['a', 2]}, "key 'reconstruction.b_range.0'"),
        ({'b_range': [math.inf, 2]}, "key 'reconstruction.b_range.0': input should be a finite number, got inf"),
        ({'warm_up': 1.0}, "key 'reconstruction.warm_up'"),
        ({'warm_up': -0.1}, "key 'reconstruction.warm_up'"),
        ({'iters': 0}, "key 'reconstruction.iters'"),
        ({'iters': None}, "key 'reconstruction.iters'"),
        ({'iters': '20'}, "key 'reconstruction.iters': input should be a valid integer, got '20'"),
        ({'iters': True}, "key 'reconstruction.iters'"),
        ({'batch_size': 0}, "key 'reconstruction.batch_size'"),
        ({'tokens_per_step': 8}, "key 'reconstruction.tokens_per_step': input should be greater than or equal to 16"),
        ({'tokens_per_step': 'all'}, "key 'reconstruction.tokens_per_step'"),
        ({'max_boxes': 0}, "key 'reconstruction.max_boxes'"),
        ({'weight_lr': 0}, "key 'reconstruction.weight_lr': input should be greater than 0, got 0"),
        ({'weight_lr': math.nan}, "key 'reconstruction.weight_lr': input should be a finite number, got nan"),
        ({'scale_lr': -1}, "key 'reconstruction.scale_lr'"),
        ({'regulariser': -1}, "key 'reconstruction.regulariser'"),
        ({'regulariser': math.inf}, "key 'reconstruction.regulariser'"),
        ({'activations': 'no'}, "key 'reconstruction.activations': input should be a valid boolean, got 'no'"),
        ({'loss': 'SquaredError'}, "key 'reconstruction.loss'"),
        ({'loss': {}}, "key 'reconstruction.loss.type' is missing"),
        ({'cache': {'store': 'gpu'}}, "input should be 'auto', 'device', 'host' or 'disk', got 'gpu'"),
        ({'cache': {'dtype': 'float16'}}, "input should be 'float32' or 'bfloat16', got 'float16'"),
        ('fast', "key 'reconstruction'"),
        (True, "key 'reconstruction'"),
        ([1], "key 'reconstruction'"),
    ],
)
def test_mistakes_in_reconstruction_are_one_clear_line(settings, message):
    with pytest.raises(ConfigError) as info:
        parse_quant_config(GOOD | {'reconstruction': settings}, 'exp/x.yaml')
    assert str(info.value).startswith('exp/x.yaml: ')
    assert message in str(info.value)
    assert '\n' not in str(info.value)


def test_no_recipe_reconstructs_unless_asked():
    assert parse_quant_config(GOOD, 'here').reconstruction is None
    assert parse_quant_config(GOOD | {'reconstruction': None}, 'here').reconstruction is None
    assert parse_quant_config(GOOD | {'reconstruction': {}}, 'here').reconstruction.preset == 'fast'


@pytest.mark.parametrize('preset', PRESETS)
def test_a_preset_gives_what_is_left_out(preset):
    settings = parse_quant_config(GOOD | {'reconstruction': {'preset': preset}}, 'here').reconstruction
    given = settings.model_dump()
    assert PRESETS[preset].items() <= given.items()
    own = {'iters': 3, 'tokens_per_step': None, 'weight_lr': 0.5}
    changed = parse_quant_config(GOOD | {'reconstruction': {'preset': preset, **own}}, 'here').reconstruction
    assert changed.model_dump() == given | own


def test_presets_give_the_same_settings():
    assert PRESETS['paper'].keys() == PRESETS['fast'].keys()


def test_the_preset_of_the_papers():
    """Methods.md 1.5."""
    settings = parse_quant_config(GOOD | {'reconstruction': {'preset': 'paper'}}, 'here').reconstruction
    assert (settings.iters, settings.batch_size, settings.warm_up, settings.b_range) == (20000, 1, 0.2, (20, 2))
    assert (settings.weight_lr, settings.scale_lr, settings.regulariser) == (1e-3, 4e-5, 0.01)
    assert settings.drop_prob == 0.5 and settings.tokens_per_step is None
    assert not settings.relative_regulariser and not settings.relative_scale_lr


def test_a_recipe_with_reconstruction_survives_a_manifest():
    raw = GOOD | {'reconstruction': {'preset': 'paper', 'b_range': [10, 3]}, 'compat': {'loss_dim1': True}}
    config = parse_quant_config(raw, 'here')
    plain = json.loads(json.dumps(config.plain()))
    assert parse_quant_config(plain, 'again') == config
    assert config.compat.active == ['loss_dim1']
    assert parse_quant_config(GOOD, 'here').compat.active == []


@pytest.mark.parametrize(
    ('compat', 'part'),
    [
        ({'keep_drop_prob': True}, 'without reconstruction'),
        ({'big_observer': True}, 'without the hook BimodalIntegration'),
        ({'published_agq': True}, 'without a rule with AGQ'),
        ({'published_lnq': True}, 'without a rule with LNQ'),
        ({'published_hluq': True}, 'without a rule with HLUQ'),
        ({'published_cag': True}, 'without a rule with CAG'),
        ({'beta_multiplier': 2}, 'without the hook ConditionNumberReduction'),
    ],
)
def test_a_compat_switch_without_effect_is_refused(compat, part):
    switch = next(iter(compat))
    with pytest.raises(ConfigError, match=rf'compat\.{switch} has no effect {part}; leave it out'):
        parse_quant_config(GOOD | {'compat': compat}, 'here')


def test_beta_multiplier_is_off_at_one():
    raw = GOOD | {'hooks': [{'type': 'ConditionNumberReduction'}]}
    assert parse_quant_config(raw | {'compat': {'beta_multiplier': 1}}, 'here').compat.active == []
    assert parse_quant_config(raw | {'compat': {'beta_multiplier': 2}}, 'here').compat.active == ['beta_multiplier']


@pytest.mark.parametrize(
    ('parts', 'resolved'),
    [
        ({}, {}),
        # a part that is as the whole is not told
        ({'encoder': None, 'decoder': {'weight': 4}}, {}),
        ({'decoder': {'act': 6}}, {'decoder': {'weight': 4, 'act': 6}}),
        (
            {'decoder': {'weight': 6, 'act': 6}, 'encoder': {'weight': 8}},
            {'encoder': {'weight': 8, 'act': 8}, 'decoder': {'weight': 6, 'act': 6}},
        ),
    ],
)
def test_bits_of_parts(parts, resolved):
    config = parse_quant_config(GOOD | {'bits': BITS | parts}, 'here')
    assert config.bits.resolved() == BITS | resolved
    assert parse_quant_config(json.loads(json.dumps(config.plain())), 'again') == config


def options(*words):
    """What the command line makes of `--quant-options`."""
    return parse_args(['model.py', 'recipe.yaml', '--quant-options', *words]).quant_options


def test_the_command_line_wins_over_the_preset():
    recipe = ROOT / 'exp' / 'qdrop' / 'w4a4.yaml'
    fast = load_quant_config(recipe).reconstruction
    assert fast.preset == 'fast' and fast.iters == PRESETS['fast']['iters']
    paper = load_quant_config(recipe, options('reconstruction.preset=paper')).reconstruction
    assert PRESETS['paper'].items() <= paper.model_dump().items()
    assert paper.unit == fast.unit, 'what the recipe says itself stays'
    both = load_quant_config(recipe, options('reconstruction.preset=paper', 'reconstruction.iters=20')).reconstruction
    assert both == paper.model_copy(update={'iters': 20})
    only = load_quant_config(recipe, options('reconstruction.iters=20')).reconstruction
    assert only == fast.model_copy(update={'iters': 20})


def test_values_on_the_command_line():
    recipe = ROOT / 'exp' / 'qdrop' / 'w4a4.yaml'
    words = ['tokens_per_step=None', 'b_range=10,3', 'weight_lr=1e-3', 'activations=false', 'cache.store=disk']
    settings = load_quant_config(recipe, options(*(f'reconstruction.{word}' for word in words))).reconstruction
    assert settings.tokens_per_step is None and settings.b_range == (10, 3) and settings.weight_lr == 1e-3
    assert not settings.activations and settings.cache.store == 'disk' and settings.cache.dtype == 'float32'
    assert load_quant_config(recipe, options('reconstruction=None')).reconstruction is None
    without = load_quant_config(ROOT / 'exp' / 'mse' / 'w4a4.yaml', options('reconstruction.iters=5')).reconstruction
    assert without.iters == 5 and without.preset == 'fast', 'a recipe without the section gets it'


def test_bits_of_a_part_on_the_command_line(tmp_path):
    """Whether or not the recipe has bits for that part."""
    plain, own = tmp_path / 'plain.yaml', tmp_path / 'own.yaml'
    plain.write_text('algorithm: a\nbits: {weight: 4, act: 4}\n')
    own.write_text('_base_: plain.yaml\nbits: {decoder: {weight: 6, act: 6}}\n')
    bits = [load_quant_config(path, options('bits.decoder.act=8')).bits.resolved() for path in (plain, own)]
    assert bits[0] == {'weight': 4, 'act': 4, 'decoder': {'weight': 4, 'act': 8}}
    assert bits[1] == {'weight': 4, 'act': 4, 'decoder': {'weight': 6, 'act': 8}}
    assert load_quant_config(own, options('bits.decoder=None')).bits.resolved() == {'weight': 4, 'act': 4}


def test_base_files_and_overrides(tmp_path):
    (tmp_path / 'base.yaml').write_text(
        'algorithm: a\nbits: {weight: 8, act: 8}\ncalibration: {num_images: 5, seed: 3}\n'
    )
    (tmp_path / 'child.yaml').write_text('_base_: base.yaml\nbits: {weight: 4, act: 6}\n')
    config = load_quant_config(tmp_path / 'child.yaml', {'calibration.num_images': 2})
    assert (config.bits.weight, config.bits.act) == (4, 6)
    assert (config.calibration.num_images, config.calibration.seed) == (2, 3)
    (tmp_path / 'delete.yaml').write_text('_base_: base.yaml\ncalibration: {_delete_: true, num_images: 7}\n')
    assert load_quant_config(tmp_path / 'delete.yaml').calibration.seed == 0


def test_override_typo_names_the_key(tmp_path):
    (tmp_path / 'a.yaml').write_text('algorithm: a\nbits: {weight: 8, act: 8}\n')
    with pytest.raises(ConfigError, match=r"with --quant-options: unknown key 'calibration.num_imges' \(did you mean"):
        load_quant_config(tmp_path / 'a.yaml', {'calibration.num_imges': 2})


@pytest.mark.parametrize(
    ('given', 'advised'),
    [
        ('hooks=PerceptualClipping', True),
        ('hooks=[dict(type="PerceptualClipping")]', True),
        ('hooks.0=PerceptualClipping', True),
        ('hooks.2.type=PerceptualClipping', True),
        ('hooks.PerceptualClipping.theta=0.4', True),
        ('rules=[{match:image_encoder.*}]', True),
        ('rules.3.enabled=False', True),
        ('rules.0.enabled=on', False),
        ('rules.0.enable=False', False),
        ('calibration=3', False),
        ('hooks.1.theta=0.4', None),
        ('rules.2.enabled=False', None),
        ('hooks=[]', None),
    ],
)
def test_lists_on_the_command_line(given, advised):
    """They cannot be written there; what a recipe has in one can be changed."""
    recipe = ROOT / 'exp' / 'saq_sam' / 'w4a4.yaml'
    if advised is None:
        assert load_quant_config(recipe, options(given)) != load_quant_config(recipe)
        return
    with pytest.raises(ConfigError) as info:
        load_quant_config(recipe, options(given))
    assert str(info.value).endswith(LIST_ADVICE) == advised
    assert '\n' not in str(info.value)


def test_lists_that_a_recipe_lacks():
    with pytest.raises(ConfigError, match=r"key 'hooks': input should be a valid list; write lists in a recipe"):
        load_quant_config(ROOT / 'exp' / 'mse' / 'w4a4.yaml', options('hooks.0.theta=0.5'))
    # a mistake of the recipe's own is no matter of options
    with pytest.raises(ConfigError, match=r"key 'hooks': input should be a valid list, got 'PCC'$"):
        parse_quant_config(GOOD | {'hooks': 'PCC'}, 'here')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'calibration': {'observer': {'act': {'type': 'MSE', 'symmetric': True}}}},
            "key 'calibration.observer.act': 'symmetric' of MSE is that of the quantizer; leave it out",
        ),
        (
            {'reconstruction': {part: {'enabled': False} for part in ('encoder', 'decoder')}},
            "key 'reconstruction': both parts are disabled; leave out the section (reconstruction=None), or enable one",
        ),
        ({'compat': ['soft_weights']}, "key 'compat': input should be a valid dictionary"),
    ],
)
def test_sections_are_not_repeated(change, message):
    with pytest.raises(ConfigError) as info:
        parse_quant_config(GOOD | change, 'here')
    assert str(info.value) == f'here: {message}'


def test_a_recipe_is_only_data(tmp_path):
    marker = tmp_path / 'ran'
    (tmp_path / 'evil.yaml').write_text(f'algorithm: !!python/object/apply:os.mkdir ["{marker}"]\n')
    with pytest.raises(ConfigError, match='not valid YAML'):
        load_quant_config(tmp_path / 'evil.yaml')
    with pytest.raises(yaml.YAMLError):
        Config.fromfile(tmp_path / 'evil.yaml')
    (tmp_path / 'base.py').write_text(f'import os\nos.mkdir({str(marker)!r})\n')
    (tmp_path / 'child.yaml').write_text('_base_: base.py\n')
    with pytest.raises(ConfigError, match=r'inherits from YAML files'):
        load_quant_config(tmp_path / 'child.yaml')
    assert not marker.exists()


@pytest.mark.parametrize(
    'text',
    [
        '_base_: this.yaml\n',
        '_base_: 3\n',
        'bits: {weight: 4, act: 4}\nbits: {weight: 8, act: 8}\n',
        '_base_: [one.yaml, two.yaml]\n',
        '_base_: one.yaml\nalgorithm: {name: x}\n',
        'filename: x\n',
        b'\xff\xfe\x00',
    ],
)
def test_strange_recipes_are_one_clear_line(tmp_path, text):
    for name in ('one', 'two'):
        (tmp_path / f'{name}.yaml').write_text('algorithm: a\n')
    path = tmp_path / 'this.yaml'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r'this\.yaml') as info:
        load_quant_config(path)
    assert '\n' not in str(info.value)


def test_unreadable_recipes(tmp_path):
    with pytest.raises(ConfigError, match='no such recipe'):
        load_quant_config(tmp_path / 'none.yaml')
    (tmp_path / 'broken.yaml').write_text('bits: {weight: 4\n')
    with pytest.raises(ConfigError, match='not valid YAML'):
        load_quant_config(tmp_path / 'broken.yaml')
    (tmp_path / 'orphan.yaml').write_text('_base_: missing.yaml\nalgorithm: a\n')
    with pytest.raises(ConfigError, match=r'orphan\.yaml'):
        load_quant_config(tmp_path / 'orphan.yaml')
    (tmp_path / 'list.yaml').write_text('- 1\n- 2\n')
    with pytest.raises(ConfigError, match=r'list\.yaml'):
        load_quant_config(tmp_path / 'list.yaml')
