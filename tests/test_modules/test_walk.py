"""Walks over the quantizers of a model."""

import pytest
import torch

from ptqsam.config import parse_quant_config
from ptqsam.modules.walk import quantizers, quantizers_off
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.test_projects.helpers import make_model


@torch.no_grad()
def test_quantizers_are_off_for_a_while():
    """Then all are in the modes that they had, also after an error; nothing that was observed is lost."""
    model, image = make_model(), torch.randn(1, 3, 64, 64)
    plain = model.encode(image)
    quantize_model(model.sam, RuleBook(parse_quant_config({'algorithm': 'x', 'bits': {'weight': 4, 'act': 4}}, 'x')))
    locked, observing, *others = (q for q in quantizers(model.sam.image_encoder) if q.path.endswith('qkv.input'))
    locked.lock(torch.tensor(-0.01), torch.tensor(0.01))
    observing.mode = 'observe'
    quantized = model.encode(image)
    seen = observing.observer.max_val.clone()
    with pytest.raises(KeyError), quantizers_off(model.sam):
        assert torch.equal(model.encode(image), plain) and not torch.equal(quantized, plain)
        raise KeyError
    assert (locked.mode, observing.mode) == ('quantize', 'observe') and locked.locked
    assert all(quantizer.mode == 'off' for quantizer in others)
    assert torch.equal(observing.observer.max_val, seen) and torch.equal(model.encode(image), quantized)
