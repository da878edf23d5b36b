"""Calibrated models to examine: of a recipe, of its packed checkpoint, of the recipe at other bits."""

import copy
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import Tensor

from ptqsam.analysis.sensitivity import Subject
from ptqsam.analysis.switches import Switches
from ptqsam.checkpoint import load_packed
from ptqsam.cli import build_runner
from ptqsam.config import QuantConfig
from ptqsam.config.recipe import Rule
from ptqsam.errors import ConfigError
from ptqsam.modules import QuantOp
from ptqsam.modules.walk import quant_ops
from ptqsam.reconstruction.engine import Sample
from ptqsam.solver.calibrate import batches_with_boxes
from ptqsam.solver.freeze import freeze
from ptqsam.solver.loop import PTQLoop
from ptqsam.solver.resume import check_same

# name of the case with the recipe's own bits
OWN = 'own'


class Case:
    """The stages of the loop, as far as an analysis needs them.

    Args:
        args: command line with `model_config` and `quant_config`.
        config: model config; changed.
        recipe: checked recipe.
        folder: empty folder for what the loop leaves.
        cache_dir: where detector boxes are kept.

    Attributes:
        loop: after its stage `load`: the float model with its weights, and the calibration images.
        origin: what a result depends on.
    """

    def __init__(self, args: Namespace, config: Config, recipe: QuantConfig, folder: Path, cache_dir: Path) -> None:
        # of the evaluated images only the names matter: none of them calibrates
        own = dict(limit=1, eval_fp=False, show_dir=None, resume=False, load=None, share_work=False, wandb=None)
        options = Namespace(model_config=args.model_config, quant_config=args.quant_config, **own)
        # what is learned comes from a packed checkpoint; the loop would keep a copy of the model for it
        unlearned = recipe.model_copy(update=dict(reconstruction=None))
        self.loop: PTQLoop = build_runner(config, unlearned, options, folder, cache_dir).test_loop
        self.recipe = recipe
        self.loop.model.eval()
        with self.loop.stage('load'):
            self.origin, _ = self.loop.load_model()

    @property
    def model(self) -> Any:
        """The detector-prompted SAM."""
        return self.loop.model

    def samples(self, count: int) -> list[Sample]:
        """The first calibration images that have boxes, with the boxes that calibration uses.

        Args:
            count: how many.

        Raises:
            ConfigError: there are fewer.
        """
        calibration = self.recipe.calibration
        batches = batches_with_boxes(self.loop.calib_loader, calibration.max_boxes, calibration.seed)
        samples = [
            Sample(image, boxes) for batch in islice(batches, count) for image, boxes in self.model.sam_inputs(batch)
        ]
        if len(samples) < count:
            raise ConfigError(
                f'--images {count}: only {len(samples)} of the {calibration.num_images} calibration images have '
                f'boxes; ask for fewer, or draw more with --quant-options calibration.num_images'
            )
        return samples

    def calibrated(self, name: str) -> Subject:
        """Calibrate as the loop does, hooks included, and quantize the weights to nearest.

        Args:
            name: of the case.
        """
        plain = self._calibrate()
        freeze(self.loop.target)
        return Subject(self.model, Switches(self.loop.target, plain), self.loop.rules, name)

    def packed(self, folder: Path) -> Subject:
        """Take quantizers and quantized weights from a packed checkpoint.

        The float weights behind hooks that change them are in no checkpoint; calibration makes them once more.

        Args:
            folder: of the checkpoint.

        Raises:
            AssetError: damaged, or made for another model, from other weights or with another recipe.
        """
        sam = copy.deepcopy(self.loop.target)
        manifest, rules = load_packed(folder, sam)
        check_same(folder, manifest, self.recipe, self.model.origin()['checkpoint'])
        if self.recipe.hooks:
            plain = self._calibrate()
        else:
            weights = dict(self.loop.target.named_parameters())
            plain = {name: weights[f'{name}.weight'] for name, _, _ in quant_ops(sam)}
        self.model.sam = sam
        return Subject(self.model, Switches(sam, plain), rules, OWN)

    def _calibrate(self) -> dict[str, Tensor]:
        """Run the stages `prepare` and `calibrate`; returns the float weights of the model as it is then."""
        loop = self.loop
        with loop.stage('prepare'):
            loop.prepare(None)
        with loop.stage('calibrate'):
            loop.calibrate(self.origin)
        return {name: float_weight(op) for name, op, _ in quant_ops(loop.target)}


def float_weight(op: QuantOp) -> Tensor:
    """Weight of an operator before it is frozen, without what a hook has done to its function."""
    return op.weight.detach() if op.original is None else op.original


def at_bits(recipe: QuantConfig, bits: int) -> QuantConfig:
    """The recipe from statistics alone, with one bit width for all quantizers."""
    rules = (*recipe.rules, Rule(match=('*',), bits=bits))
    return recipe.model_copy(update=dict(rules=rules, reconstruction=None))
