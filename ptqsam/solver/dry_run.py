"""What a run would do, without doing it: which quantizer goes where, sizes, data, rough time and memory per stage."""

import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DefaultScope
from torch import Tensor

from ptqsam.checkpoint import float_bytes
from ptqsam.config import QuantConfig
from ptqsam.errors import AssetError, ConfigError
from ptqsam.estimate import Machine, Work, measure_machine, measure_work, packed_bytes
from ptqsam.report.summary import align, rule_table
from ptqsam.solver.calibrate import draw_images
from ptqsam.solver.prepare import quantize_model
from ptqsam.solver.rules import RuleBook


@dataclass
class Images:
    """Images of a stage.

    Attributes:
        name: annotation file.
        wanted: images to be used; None: all.
        objects: for each image that will be used, its annotated objects; None where that is not known.
        available: images in the annotation file.
        problem: what is missing and what to do, or ''.
    """

    name: str
    wanted: int | None
    objects: list[int] | None = None
    available: int = 0
    problem: str = ''

    @property
    def count(self) -> int | None:
        """Images that will be used, as far as is known."""
        return self.wanted if self.objects is None else len(self.objects)

    def boxes(self, oracle: bool, most: int) -> int | None:
        """Prompt boxes on all images: as many as there are objects for the oracle, else the most there can be.

        Args:
            oracle: the annotated boxes are the prompts.
            most: boxes that are used of an image.
        """
        if oracle and self.objects is not None:
            return sum(min(count, most) for count in self.objects)
        return None if self.count is None else self.count * most


def describe_run(config: Config, recipe: QuantConfig, limit: int | None) -> str:
    """Describe a run. The model is built on the meta device, so neither its weights nor its memory are needed.

    Args:
        config: model config.
        recipe: checked recipe.
        limit: evaluate only the first so many images; None: all.

    Returns:
        Text for people. Missing files are lines that begin with 'missing:'.

    Raises:
        ConfigError: the model config cannot be built, a rule matches nothing, or nothing is quantized.
    """
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
        with torch.device('meta'):
            model = MODELS.build(config.model).eval().requires_grad_(False)
        calibration = find_images(config.calib_dataset, recipe.calibration.num_images, recipe.calibration.seed)
        evaluation = find_images(config.test_dataloader.dataset, limit)
    encoder, decoder = encoder_work(model), decoder_work(model)
    float_size = float_bytes(model.sam)
    rules = RuleBook(recipe)
    with torch.device('meta'):
        quantize_model(model.sam, rules)
    packed_size = packed_bytes(model.sam)

    bits = f'W{recipe.bits.weight}A{recipe.bits.act}'
    sections = [
        f'recipe  {recipe.algorithm} {bits}\n{rule_table(rules)}',
        f'sizes   float {float_size / 1e6:.1f} MB, packed about {packed_size / 1e6:.1f} MB',
        data_lines(calibration, evaluation, model.sam_checkpoint),
        estimate_lines(model, (calibration, evaluation), (encoder, decoder), recipe.calibration.max_boxes, float_size),
    ]
    return '\n\n'.join(sections)


def find_images(dataset_config: Any, wanted: int | None, seed: int | None = None) -> Images:
    """Look at a dataset's annotations.

    Args:
        dataset_config: config of an mmdet dataset.
        wanted: images to be used; None: all.
        seed: draw them at random with this seed; None: take the first ones.

    Returns:
        What was found; a missing or damaged file is its `problem`.
    """
    images = Images(str(dataset_config.get('ann_file', '')), wanted)
    try:
        dataset = DATASETS.build(dataset_config)
        dataset.full_init()
        images.available = len(dataset)
        count = images.available if wanted is None else wanted
        used = range(min(count, images.available)) if seed is None else draw_images(images.available, count, seed)
    except (AssetError, ConfigError, FileNotFoundError) as error:
        images.problem = str(error)
        return images
    infos = [dataset.get_data_info(index) for index in used]
    images.objects = [sum(not item['ignore_flag'] for item in info['instances']) for info in infos]
    return images


def encoder_work(model: Any) -> Work:
    """Cost of embedding one image."""
    side = model.sam.image_size
    return measure_work(lambda: model.encode(torch.empty(1, 3, side, side)))


def decoder_work(model: Any) -> Work:
    """Cost of one chunk of prompt boxes: decoding, and masks of the size of the image."""
    sam, chunk = model.sam, model.options.chunk_size
    size = (sam.image_size, sam.image_size)
    embedding = torch.empty(
        1, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size, device='meta'
    )

    def forward() -> Tensor:
        logits, _ = model.decode_logits(embedding, torch.empty(chunk, 4))
        return sam.postprocess_masks(logits[:, None], size, size) > 0

    return measure_work(forward)


def data_lines(calibration: Images, evaluation: Images, checkpoint: str | None) -> str:
    """Images wanted and available, and what is missing."""
    lines = []
    for title, images in (('calibrate', calibration), ('evaluate', evaluation)):
        wanted = 'all' if images.wanted is None else images.wanted
        available = f' of {images.available}' if images.available else ''
        lines.append(f'{title:9} {wanted}{available} images of {images.name}')
    lines += [f'missing: {images.problem}' for images in (calibration, evaluation) if images.problem]
    if checkpoint and not Path(checkpoint).is_file():
        lines.append(f'missing: {checkpoint}: no such checkpoint; get it with tools/download.py, or set PTQSAM_CKPT')
    return '\n'.join(lines)


def estimate_lines(
    model: Any, images: tuple[Images, Images], work: tuple[Work, Work], max_boxes: int, weights: int
) -> str:
    """Rough time and memory per stage on this machine.

    Args:
        model: detector-prompted SAM.
        images: of calibration and of evaluation.
        work: of one image (encoder) and of one chunk of boxes (decoder).
        max_boxes: boxes of a calibration image.
        weights: bytes of SAM.
    """
    device = torch.device(get_device())
    machine = measure_machine(device)
    encoder, decoder = work
    chunk, most = model.options.chunk_size, model.options.max_boxes
    oracle = model.detector.identity() is None
    memory = process_bytes(device) + weights + max(encoder.peak, decoder.peak)
    rows = [('stage', 'images', 'boxes', 'time', 'memory')]
    for stage, used, limit in zip(('calibrate', 'evaluate'), images, (min(max_boxes, most), most), strict=True):
        boxes = used.boxes(oracle, limit)
        if used.count is None or boxes is None:
            rows.append((stage, '?', '?', '?', gigabytes(memory)))
            continue
        seconds = used.count * machine.seconds(encoder) + boxes / chunk * machine.seconds(decoder)
        at_most = '' if oracle else 'at most '
        rows.append((stage, str(used.count), f'{at_most}{boxes}', duration(seconds), gigabytes(memory)))
    return '\n'.join(
        [
            f'encoder {encoder.flops / 1e9:.1f} GFLOP per image, decoder {decoder.flops / chunk / 1e9:.2f} per box',
            f'this machine ({device.type}) now: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s',
            align(rows),
            'time and memory are rough',
        ]
    )
