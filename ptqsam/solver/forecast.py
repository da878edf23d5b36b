"""A run before it is run: sizes, images, rough time and memory per stage."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from ptqsam.checkpoint import float_bytes
from ptqsam.config import QuantConfig
from ptqsam.download import how_to_get
from ptqsam.errors import AssetError, ConfigError
from ptqsam.estimate import Machine, Work, measure_work, memory_in_use, packed_bytes
from ptqsam.modules.walk import act_quantizers
from ptqsam.registry import SOLVER_HOOKS, build_part
from ptqsam.solver.calibrate import check_calibration, draw_images
from ptqsam.solver.datasets import build_dataset, image_names
from ptqsam.solver.options import RunOptions
from ptqsam.solver.prepare import check_hooks, quantize_model
from ptqsam.solver.reconstruct import check_reconstruction, first_pass
from ptqsam.solver.reconstruction_plan import Plan, plan_reconstruction
from ptqsam.solver.rules import RuleBook

# Memory of a run over that of the tensors which exist at a time in a forward pass: the allocator's pieces, and the
# measurement of quantization errors. Measured on a CPU: MobileSAM 1.5 to 2.4 GB (estimate 1.5), SAM-B 3.8 (4.4).
OVERHEAD = 2


@dataclass
class Images:
    """Images of a stage.

    Attributes:
        file: annotation file.
        wanted: images to be used; None: all.
        names: file names of all images in the annotation file.
        dataset: of the images that will be used; None where that is not known.
        problem: what is missing and what to do, or ''.
    """

    file: Path
    wanted: int | None
    names: list[str] = field(default_factory=list)
    dataset: Any = None
    problem: str = ''

    @property
    def count(self) -> int | None:
        """Images that will be used, as far as is known."""
        return self.wanted if self.dataset is None else len(self.dataset)


@dataclass(frozen=True)
class StageEstimate:
    """Rough cost of a stage.

    Attributes:
        name: of the stage, or of a solver hook that runs the calibration images.
        images: images that it runs; None if that is not known.
        boxes: prompt boxes on them, likewise.
        at_most: there may be fewer boxes.
        seconds: time, likewise.
        memory: bytes.
    """

    name: str
    images: int | None
    boxes: int | None
    at_most: bool
    seconds: float | None
    memory: int


@dataclass(frozen=True)
class Costs:
    """What a run costs as far as model and recipe tell.

    Attributes:
        float_size, packed_size: bytes of SAM.
        encoder: work for one image.
        decoder: work for one chunk of boxes.
        rules: which quantizer goes where.
        hooks: solver hooks, which have been shown the model.
        plan: of the reconstruction, if there is one.
    """

    float_size: int
    packed_size: int
    encoder: Work
    decoder: Work
    rules: RuleBook
    hooks: list[Any]
    plan: Plan | None


@dataclass(frozen=True)
class Forecast:
    """A run before it is run; the model is on the meta device, so neither its weights nor its memory are needed.

    Attributes:
        model: detector-prompted SAM.
        recipe: the recipe.
        calibration, evaluation: images of the two stages.
        costs: what quantizing the model showed.
    """

    model: Any
    recipe: QuantConfig
    calibration: Images
    evaluation: Images
    costs: Costs

    def stages(self, machine: Machine) -> list[StageEstimate]:
        """Rough time and memory of each stage on a machine."""
        most = self.model.options.max_boxes
        images = {
            'calibrate': (self.calibration, min(self.recipe.calibration.max_boxes, most)),
            'evaluate': (self.evaluation, most),
        }
        costs = self.costs
        return estimate_stages(
            self.model, machine, images, costs.encoder, costs.decoder, costs.float_size, costs.plan, costs.hooks
        )

    @property
    def problems(self) -> list[str]:
        """Files that are missing or unfit, one line each."""
        problems = [images.problem for images in (self.calibration, self.evaluation) if images.problem]
        for checkpoint in (self.model.sam.checkpoint, getattr(self.model.detector, 'checkpoint', None)):
            if checkpoint and not Path(checkpoint).is_file():
                problems.append(f'{checkpoint}: no such checkpoint; {how_to_get(checkpoint)}, or set PTQSAM_CKPT')
        return problems


def forecast_run(config: Config, recipe: QuantConfig, limit: int | None) -> Forecast:
    """Build and quantize the model of a run on the meta device, and look at its images.

    Args:
        config: model config.
        recipe: checked recipe.
        limit: evaluate only the first so many images; None: all.

    Raises:
        ConfigError: the model config cannot be built, a rule matches nothing, or nothing is quantized.
    """
    drawn = recipe.calibration
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
        with torch.device('meta'):
            model = MODELS.build(config.model).eval().requires_grad_(False)
        evaluation = find_images(config.test_dataloader.dataset, limit, lambda names: range(len(names))[:limit])
        calibration = find_images(
            config.calib_dataset,
            drawn.num_images,
            lambda names: draw_images(
                names, evaluation.names, drawn.num_images, drawn.seed, recipe.compat.first_images
            ),
        )
    counts = known_counts(model, calibration)
    if counts is None:
        counts = [drawn.max_boxes] * (calibration.count or drawn.num_images)
    return Forecast(model, recipe, calibration, evaluation, estimate_costs(model, recipe, counts))


def estimate_costs(model: Any, recipe: QuantConfig, counts: Sequence[int]) -> Costs:
    """Quantize a model on the meta device, check whether the recipe suits it, and find out what a run would cost.

    Args:
        model: detector-prompted SAM on the meta device; is quantized afterwards.
        recipe: checked recipe.
        counts: prompt boxes on each calibration image.

    Raises:
        ConfigError: a rule matches nothing, nothing is quantized, or hooks or settings do not suit the model.
    """
    float_size, rules = float_bytes(model.sam), RuleBook(recipe)
    hooks = [build_part(SOLVER_HOOKS, part.type, **part.kwargs()) for part in recipe.hooks]
    with torch.device('meta'):
        quantize_model(model.sam, rules)
    check_hooks(hooks, model.sam, rules.choices)
    check_reconstruction(recipe)
    check_calibration(recipe, model.options.chunk_size)
    packed_size = packed_bytes(model.sam)
    with copies_counted(model.sam):
        encoder, decoder = encoder_work(model), decoder_work(model)
        with first_pass(model):
            plan = plan_reconstruction(model, recipe, counts, torch.device(get_device()))
    return Costs(float_size, packed_size, encoder, decoder, rules, hooks, plan)


def find_images(dataset_config: Any, wanted: int | None, choose: Callable[[list[str]], Iterable[int]]) -> Images:
    """Look at a dataset's annotations.

    Args:
        dataset_config: config of an mmdet dataset.
        wanted: images to be used; None: all.
        choose: file names of all images -> positions of those to be used.

    Returns:
        What was found; a missing or damaged file, or too few images, are its `problem`.
    """
    images = Images(Path(dataset_config.get('data_root') or '', dataset_config.ann_file), wanted)
    try:
        dataset = build_dataset(dataset_config)
        images.names = image_names(dataset)
        dataset.get_subset_(list(choose(images.names)))
    except (AssetError, ConfigError) as error:
        images.problem = str(error)
        return images
    images.dataset = dataset
    return images


@contextmanager
def copies_counted(model: nn.Module) -> Iterator[None]:
    """Let quantizers that are off make the copies that they make when they are on; for `measure_work`."""

    def copy(quantizer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return output if kwargs.get('inplace') else output.clone()

    handles = [quantizer.register_forward_hook(copy, with_kwargs=True) for quantizer in act_quantizers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def encoder_work(model: Any) -> Work:
    """Cost of embedding one image."""
    side = model.sam.image_size
    return measure_work(lambda: model.encode(torch.empty(1, 3, side, side)))


def decoder_work(model: Any) -> Work:
    """Cost of one chunk of prompt boxes: decoding, and masks of the size of the image."""
    sam, chunk = model.sam, model.options.chunk_size
    size = (sam.image_size, sam.image_size)
    embedding = torch.empty(1, sam.prompt_encoder.embed_dim, *sam.prompt_encoder.image_embedding_size, device='meta')

    def forward() -> Tensor:
        logits, _ = model.decode_logits(embedding, torch.empty(chunk, 4))
        return sam.postprocess_masks(logits[:, None], size, size) > 0

    return measure_work(forward)


def forward_memory(device: torch.device, weights: int, encoder: Work, decoder: Work) -> int:
    """Bytes that calibration and evaluation take at most, see `estimate_lines`."""
    return memory_in_use(device) + weights + OVERHEAD * max(encoder.peak, decoder.peak)


def kept_by_hooks(hooks: Sequence[Any]) -> dict[str, int]:
    """Bytes that solver hooks keep while they run the calibration images, as their `calibration_bytes` say."""
    return {type(hook).__name__: kept for hook in hooks if (kept := getattr(hook, 'calibration_bytes', 0))}


def box_count(model: Any, images: Images, most: int) -> tuple[int | None, bool]:
    """Prompt boxes on all images of a stage.

    Args:
        model: detector-prompted SAM.
        images: of the stage.
        most: boxes that are used of an image.

    Returns:
        Their number as far as is known, and whether that is only what there can be at most.
    """
    counts = known_counts(model, images)
    if counts is not None:
        return sum(min(count, most) for count in counts), False
    return None if images.count is None else images.count * most, True


def known_counts(model: Any, images: Images) -> list[int] | None:
    """Prompt boxes of each image, where the annotations or the box cache tell."""
    if images.dataset is None:
        return None
    try:
        return model.count_boxes(images.dataset, os.environ.get('PTQSAM_CACHE', RunOptions.cache_dir))
    except AssetError:  # the detector's checkpoint is missing, which `data_lines` tells
        return None


def estimate_stages(
    model: Any,
    machine: Machine,
    stages: dict[str, tuple[Images, int]],
    encoder: Work,
    decoder: Work,
    weights: int,
    plan: Plan | None = None,
    hooks: Sequence[Any] = (),
) -> list[StageEstimate]:
    """Rough time and memory per stage.

    Args:
        model: detector-prompted SAM.
        machine: its speed.
        stages: name -> its images, and the boxes that are used of an image.
        encoder: work for one image.
        decoder: work for one chunk of boxes.
        weights: bytes of SAM.
        plan: of the reconstruction, if there is one.
        hooks: solver hooks; one that runs the calibration images itself says how often in its attribute
            `calibration_passes`.
    """
    device = torch.device(get_device())
    memory = forward_memory(device, weights, encoder, decoder)
    chunk = model.options.chunk_size
    estimates = []
    before = {type(hook).__name__: passes for hook in hooks if (passes := getattr(hook, 'calibration_passes', 0))}
    kept = kept_by_hooks(hooks)
    repeats = {**before, **dict.fromkeys(stages, 1)}
    for stage, times in repeats.items():
        images, most = stages['calibrate' if stage in before else stage]
        boxes, bound = box_count(model, images, most)
        seconds = None
        if images.count is not None and boxes is not None:
            seconds = times * (images.count * machine.seconds(encoder) + boxes / chunk * machine.seconds(decoder))
        needed = memory + kept.get(stage, 0)
        estimates.append(StageEstimate(stage, images.count, boxes, bound, seconds, needed))
        if stage == 'calibrate' and plan is not None:
            seconds = plan.seconds(machine, machine.seconds(encoder), machine.seconds(decoder) / chunk)
            needed = memory + plan.kept(device) + plan.peak
            estimates.append(StageEstimate('reconstruct', plan.images, plan.boxes, False, seconds, needed))
    return estimates
