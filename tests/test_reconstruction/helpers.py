"""What tests of reconstruction share: small calibrated models, their samples, engines on them."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from ptqsam.config import Reconstruction, parse_quant_config
from ptqsam.modules.walk import act_quantizers, quantizers
from ptqsam.reconstruction.cache import ActivationCache
from ptqsam.reconstruction.engine import Reconstructor, Sample
from ptqsam.reconstruction.optimise import Optimiser
from ptqsam.solver.calibrate import calibrate_weights
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook
from tests.test_projects.helpers import make_model, random_boxes
from tests.tiny import ARCH, DECODER

TINY_VIT = dict(
    encoder='tiny_vit',
    embed_dims=(8, 16, 16, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 2, 2),
    # at 64 pixels the stages have 8, 4 and 4 tokens per side: padded windows, one window, four windows
    window_sizes=(4, 3, 4, 2),
    **DECODER,
)
# two stages of two blocks
DEEP_VIT = {**ARCH, 'depth': 4, 'global_attn_indexes': (1, 3)}
ARCHS = {'vit': ARCH, 'deep_vit': DEEP_VIT, 'tiny_vit': TINY_VIT}
LEARNED = [{'match': '*', 'quantizer': {'type': 'LSQ'}}, {'match': '*.weight', 'quantizer': {'type': 'Uniform'}}]
# no image has as many boxes as another, and one has none
BOXES = (3, 0, 2, 1)

new_cache = partial(ActivationCache, 'host', torch.device('cpu'))


def make_recipe(act: int = 4, compat: dict | None = None, **reconstruction: object):
    """A recipe whose reconstruction takes four iterations unless told otherwise."""
    observer = {'weight': {'type': 'MinMax'}, 'act': {'type': 'MinMax'}}
    return parse_quant_config(
        dict(
            algorithm='x',
            bits={'weight': 3, 'act': act},
            rules=LEARNED,
            calibration={'observer': observer},
            reconstruction={'iters': 4, 'tokens_per_step': 64, **reconstruction},
            compat=compat or {},
        ),
        'test',
    )


def make_settings(**reconstruction: object) -> Reconstruction:
    """Its part about reconstruction."""
    return make_recipe(**reconstruction).reconstruction


def make_samples(counts=BOXES, size: int = 64) -> list[Sample]:
    """Images of noise with so many boxes."""
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(torch.randn(1, 3, size, size, generator=generator), random_boxes(count, size, size, seed))
        for seed, count in enumerate(counts)
    ]


@torch.no_grad()
def calibrated_model(arch: str = 'vit', recipe=None, **options: object):
    """A detector-prompted SAM with all quantizers on, not yet frozen, and the samples that calibrated it."""
    model, samples = make_model(arch=ARCHS[arch], **options).requires_grad_(False), make_samples()
    for name, parameter in model.named_parameters():
        # otherwise many parts of a fresh model do nothing
        if name.endswith(('rel_pos_h', 'rel_pos_w', 'attention_biases', 'bn.weight', 'pos_embed')):
            nn.init.normal_(parameter, std=0.5)
        elif '.downsample.' in name and name.endswith('conv.weight'):
            parameter.mul_(6)
    quantize_model(model.sam, RuleBook(recipe or make_recipe()))
    for quantizer in act_quantizers(model.sam):
        quantizer.mode = 'observe'
    for sample in samples:
        embedding = model.encode(sample.image)
        if len(sample.boxes):
            model.decode_logits(embedding, sample.boxes)
    calibrate_weights(model.sam)
    for quantizer in quantizers(model.sam):
        quantizer.mode = 'quantize'
    return model, samples


def make_engine(model, samples, recipe, folder: Path, call_hook=lambda *_, **__: None, origin: str = 'here'):
    """An engine; the folder exists afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    return Reconstructor(model, model.sam, recipe, samples, new_cache, folder, origin, call_hook)


def prompt_aware(unit='stage', loss=None, **reconstruction):
    """A recipe with this loss; iterations take one image with all of its positions unless told otherwise."""
    return make_recipe(
        unit=unit,
        loss={'type': 'PromptAware', **(loss or {})},
        **{'batch_size': 1, 'tokens_per_step': None, **reconstruction},
    )


class Looking(Reconstructor):
    """An engine that shows every unit to the test and rounds it to nearest."""

    def reconstruct(self, unit, data, stream):
        for index in range(len(stream.forwards)):
            data.add_quantized(stream.run_until(unit, index))
        self.look(Optimiser(unit, data, self.of_unit[unit], self.recipe.compat, 0))
        for op in unit.ops.values():
            op.freeze()


def look_at(model, samples, recipe, folder, look):
    """Call `look(work)` for every unit, then run the engine to its end; `work` optimises the unit and has its data."""
    folder.mkdir()
    engine = Looking(model, model.sam, recipe, samples, new_cache, folder, '', lambda *_, **__: None)
    engine.look = look
    engine.run()
    return engine


def switched_off(*modules):
    """Turn the quantizers of modules off; call the result to put back how they were."""
    modes = {quantizer: quantizer.mode for module in modules for quantizer in quantizers(module)}
    for quantizer in modes:
        quantizer.mode = 'off'
    return lambda: [setattr(quantizer, 'mode', mode) for quantizer, mode in modes.items()]
