"""Packed checkpoints: dense b-bit codes, bit-equal after reloading, as small as the bits promise."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from ptqsam.checkpoint import float_bytes, load_packed, pack_codes, save_packed, structure, unpack_codes
from ptqsam.config import parse_quant_config
from ptqsam.errors import AssetError
from ptqsam.fileio import fingerprint
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.freeze import check_gate, freeze
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.tiny import ARCH


@given(bits=st.integers(2, 8), data=st.data())
def test_codes_survive_packing(bits, data):
    codes = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50)), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8 and packed.size == -(-codes.size * bits // 8)
    assert np.array_equal(unpack_codes(packed, bits, codes.size), codes)


def test_packing_by_hand():
    assert pack_codes(np.array([1, 2, 15]), 4).tolist() == [0x21, 0x0F]
    assert pack_codes(np.array([3, 0, 1, 2]), 2).tolist() == [0b10010011]


def build_sam():
    import projects.instance_segment_anything  # noqa: F401  (registers the model)

    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(dict(type='SegmentAnything', image_size=64, arch=ARCH | dict(embed_dim=96))).eval()


def recipe(bits, **more):
    return {'algorithm': 'x', 'bits': {'weight': bits, 'act': 8}} | more


def frozen_sam(raw):
    sam = build_sam()
    shape, fp_bytes = structure(sam), float_bytes(sam)
    rules = RuleBook(parse_quant_config(raw, 'test'))
    quantize_model(sam, rules)
    for quantizer in act_quantizers(sam):
        quantizer.mode = 'observe'
    with torch.no_grad():
        run(sam)
        for quantizer in act_quantizers(sam):
            quantizer.mode = 'quantize'
    calibrate_weights(sam)
    freeze(sam)
    check_gate(sam, rules.enabled)
    return sam, shape, fp_bytes


@torch.no_grad()
def run(sam):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    boxes = torch.tensor([[5.0, 5.0, 30.0, 40.0], [10.0, 0.0, 60.0, 60.0]])
    return sam.decode(sam.encode(image), boxes)


@pytest.mark.parametrize('bits', [2, 4, 5, 6, 8])
def test_reload_is_bit_equal_and_small(bits, tmp_path):
    symmetric = [{'match': 'role:mlp.lin1.weight', 'quantizer': {'type': 'Uniform', 'symmetric': True}}]
    raw = recipe(bits, rules=symmetric)
    sam, shape, fp_bytes = frozen_sam(raw)
    size = save_packed(tmp_path, sam, shape, raw, {}, {})
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())

    other = build_sam()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_packed(tmp_path, other)
    ours, theirs = sam.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert all(torch.equal(a, b) for a, b in zip(run(sam), run(other), strict=True))
    assert [q.path for q in quantizers(sam)] == [q.path for q in quantizers(other)]

    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    numbers = sum(int(np.prod(w['shape'])) for w in manifest['weights'].values())
    saved = 4 * numbers - sum(-(-int(np.prod(w['shape'])) * bits // 8) for w in manifest['weights'].values())
    overhead = (tmp_path / 'model.safetensors').stat().st_size - (fp_bytes - saved)
    parameters = sum(q.scale.numel() * 4 + q.zero_point.numel() * 4 for q in quantizers(sam))
    names = 160 * len(ours)  # the header of safetensors
    assert overhead <= parameters + names


def test_tampered_or_foreign(tmp_path):
    raw = recipe(4)
    sam, shape, _ = frozen_sam(raw)
    save_packed(tmp_path, sam, shape, raw, {}, {})
    manifest = json.loads((tmp_path / 'manifest.json').read_text())

    def fails(message, change, sign=True):
        changed = manifest | change
        if sign:
            changed.pop('checksum')
            changed['checksum'] = fingerprint(changed)
        (tmp_path / 'manifest.json').write_text(json.dumps(changed))
        with pytest.raises(AssetError, match=message):
            load_packed(tmp_path, build_sam())

    fails('damaged or changed', {'errors': {'x': {'sqnr': 99.0, 'cosine': 1.0}}}, sign=False)
    fails('damaged or changed', {'weights': {}}, sign=False)
    fails('SHA-256', {'sha256': '0' * 64})
    fails('another model', {'structure': 'x'})
    fails('format', {'format': 'ptqsam-packed-9'})
    fails('quantizers', {'recipe': recipe(5)})
    (tmp_path / 'manifest.json').write_text('{"format": ')
    with pytest.raises(AssetError, match='not a manifest'):
        load_packed(tmp_path, build_sam())
    (tmp_path / 'manifest.json').unlink()
    with pytest.raises(AssetError, match='no packed checkpoint'):
        load_packed(tmp_path, build_sam())


def test_interrupted_write_leaves_no_manifest(tmp_path, monkeypatch):
    raw = recipe(4)
    sam, shape, _ = frozen_sam(raw)
    save_packed(tmp_path, sam, shape, raw, {}, {})
    monkeypatch.setattr('ptqsam.checkpoint.save_file', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_packed(tmp_path, sam, shape, raw, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model.safetensors']
