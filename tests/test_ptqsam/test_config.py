"""The recipe schema: inheritance, overrides, and one clear line for every mistake."""

import pytest
import yaml
from mmengine.config import Config

from ptqsam.config import load_quant_config, parse_quant_config
from ptqsam.errors import ConfigError

GOOD = {'algorithm': 'x', 'bits': {'weight': 4, 'act': 8}}


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
        ({'compat': {'soft_weights': True}}, "unknown key 'compat.soft_weights'"),
        ({'bits': {'weight': 1, 'act': 8}}, "key 'bits.weight': input should be greater than or equal to 2, got 1"),
        ({'bits': {'weight': 4, 'act': 9}}, "key 'bits.act': input should be less than or equal to 8, got 9"),
        ({'bits': {'weight': '4', 'act': 8}}, "key 'bits.weight': input should be a valid integer, got '4'"),
        ({'bits': {'weight': 4.0, 'act': 8}}, "key 'bits.weight'"),
        ({'bits': {'weight': 4}}, "key 'bits.act' is missing"),
        ({'rules': [{'match': '*', 'bits': 16}]}, "key 'rules.0.bits'"),
        ({'rules': {'match': '*'}}, "key 'rules'"),
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
