"""Activation-aware condition-number reduction (ACNR) of AHCQ-SAM, and CondiQuant beside it. Methods.md 6.1.

A linear layer multiplies the error of its quantized input, along each singular direction of its weight, by the singular
value. Layers whose singular values differ much are given a weight with other, closer ones before calibration. That
changes their function: reconstruction, which goes on to aim at the float model, has to absorb it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from torch import Tensor, nn

from ptqsam.checks import check_number, check_whole
from ptqsam.condition_number import Spectrum, condition_number, lift_tail, project_spectrum
from ptqsam.distributed import decided_by_main
from ptqsam.errors import ConfigError, GateError
from ptqsam.evaluation.quantization_error import error_from_sums, error_sums
from ptqsam.modules import QuantOp
from ptqsam.modules.walk import act_quantizers, original_weights, quantizers
from ptqsam.quantizers import Quantizer
from ptqsam.quantizers.base import Mode
from ptqsam.registry import SOLVER_HOOKS
from ptqsam.report.condition_number import LayerCondition, plot_conditions, summarise, write_conditions
from ptqsam.solver.calibrate import calibrate_activations, own_batches
from ptqsam.solver.rules import Choice

if TYPE_CHECKING:
    from mmengine.runner import Runner

# images on which outputs are compared before and after
SQNR_IMAGES = 2
# bytes of Gram matrices and inputs that exist at a time; tokens of an image in a layer, about
MEASURED_TOGETHER, TOKENS = 4 << 30, 5000
FILES = ('condition_number.csv', 'condition_number.png')


@dataclass
class ErrorGram:
    """Gram matrix of the error dX = X - Q(X_q) of the input of a layer, summed over images.

    X is the input in the float model, Q(X_q) the quantized input in the model whose activations are quantized.

    Attributes:
        gram: sum over tokens of dX^T dX, (in, in), float64.
        tokens: their number, 0-dim, float64.
    """

    gram: Tensor
    tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, x: Tensor, x_hat: Tensor) -> None:
        """Add tokens (tokens, in) of the float model and of the quantized one; the products are made in float32."""
        error = (x - x_hat).float()
        self.gram += error.t() @ error
        self.tokens += len(error)

    def mean(self) -> Tensor:
        """Mean over tokens of dX^T dX, (in, in)."""
        return self.gram / self.tokens


class ConditionHook(Hook, ABC):
    """Frame of the hooks that lower condition numbers.

    In `before_calibrate` it calibrates the quantizers of activations, runs every calibration image through the float
    model and through the model with only its activations quantized, and adds up per layer the Gram matrix of the input
    error, from which the new singular values follow. Nothing of an image is kept but its float inputs until its second
    pass. Then it forgets everything that any quantizer has observed or searched: the run's own calibration follows.

    All layers are measured with the float model's weights, in one pass or, of a large model, in several; the released
    code goes layer by layer, so that later layers see what was changed before them. Where several processes calibrate,
    each adds up its own images, and all compute the same weights from the total.

    Args:
        threshold: only layers with at least this condition number are changed; above 1.

    Raises:
        ConfigError: a value out of range.
    """

    # All layers behind a changed one see other values, so what locks ranges of the encoder comes after this, too. There
    # ScaleReparameterization has only common zero points for what was changed; before, its ranges would no longer fit.
    changed_parts: ClassVar[tuple[str, ...]] = ('encoder', 'decoder')
    # beside the calibration: a calibration of its own, a float and a quantized pass for each group; for the dry run
    calibration_passes = 3
    calibration_bytes = 0

    def __init__(self, threshold: float) -> None:
        self.threshold = check_number(self, 'threshold', threshold, above=1)

    def check(self, model: nn.Module, choices: Sequence[Choice]) -> None:
        """Refuse a model without a linear layer with a quantized input.

        Args:
            model: SAM with quant modules.
            choices: what the rules decided.

        Raises:
            ConfigError: there is none.
        """
        layers = find_layers(model)
        self.calibration_passes = 1 + 2 * len(in_groups(layers))
        measured = min(MEASURED_TOGETHER, sum(map(measuring_bytes, layers.values())))
        # the float model's weights stay beside the new ones
        self.calibration_bytes = measured + sum(op.weight.nbytes for op in layers.values())
        if not layers:
            raise ConfigError(
                f'{type(self).__name__}: the recipe quantizes the input of no linear layer; leave the hook out, or '
                'enable such inputs with a rule'
            )

    @abstractmethod
    def new_sigma(self, spectrum: Spectrum, gram: Tensor, loop: Any) -> Tensor:
        """New singular values of a layer.

        Args:
            spectrum: of its weight.
            gram: mean over tokens of dX^T dX, (in, in).
            loop: the loop.

        Returns:
            In the order of the old ones, (r,).
        """

    @torch.no_grad()
    def before_calibrate(self, runner: 'Runner') -> None:
        """Replace the weights of badly conditioned layers.

        Raises:
            ConfigError: no linear layer has a quantized input.
            GateError: a weight or an activation is NaN or infinite, or a quantizer saw no data.
        """
        loop: Any = runner.test_loop
        self.check(loop.target, loop.rules.choices)
        if is_main_process():
            # what an earlier run left must not look like the result of this one
            for name in FILES:
                (loop.work_dir / name).unlink(missing_ok=True)
        layers = find_layers(loop.target)
        reports = {path: LayerCondition(measure(path, op.weight)) for path, op in layers.items()}
        # the last bits of a decomposition may differ between machines
        chosen = decided_by_main(lambda: [path for path in layers if reports[path].before >= self.threshold])
        bad = {path: layers[path] for path in chosen}
        if bad:
            settings = loop.recipe.calibration
            calibrate_activations(loop.model, loop.target, loop.calib_loader, settings.max_boxes, settings.seed)
            for group in in_groups(bad):
                with original_weights(loop.target):  # groups before this one have new ones
                    errors = measure_input_errors(loop, group)
                for path, error in errors.items():
                    self.change(path, group[path], error, reports[path], loop)
                del errors
                measure_outputs(loop, group, reports)
            for quantizer in quantizers(loop.target):
                if not quantizer.locked:
                    quantizer.reset()
        if is_main_process():
            write_conditions(loop.work_dir / FILES[0], reports)
            plot_conditions(loop.work_dir / FILES[1], reports, self.threshold)
            runner.logger.info(f'{type(self).__name__}: {summarise(reports, self.threshold)}')

    def change(self, path: str, op: QuantOp, error: ErrorGram, report: LayerCondition, loop: Any) -> None:
        """Give a layer its new weight; one whose input had no tokens stays as it is.

        Raises:
            GateError: the input error is NaN or infinite.
        """
        if not error.tokens:
            return
        if not bool(torch.isfinite(error.gram).all()):
            raise GateError(f'{path}.input: NaN or infinity in its error; check the checkpoint and the images')
        spectrum = Spectrum.of(op.weight)
        sigma = self.new_sigma(spectrum, error.mean(), loop)
        change = spectrum.change(sigma)
        report.after = condition_number(sigma)
        report.kept = int((sigma == spectrum.sigma).sum())
        report.weight_change = float(change.norm() / op.weight.double().norm().clamp(min=1e-300))
        op.replace_weight(op.weight + change)


@SOLVER_HOOKS.register_module()
class ConditionNumberReduction(ConditionHook):
    """Lift small singular values, least where activations err most (ACNR).

    Per layer ``ptqsam.condition_number.lift_tail``: the head of the spectrum stays, the tail only grows. To be listed
    after `BimodalIntegration`, as in the released code.

    Deviations from the released code: see `ConditionHook` and `lift_tail`; observers and searched parameters are
    forgotten before recalibration, while there averaging observers go on, and searches that ran once are kept. There,
    the error energy counts twice, which ``compat.beta_multiplier: 2`` reproduces.

    Args:
        iters: iterations, at least 1. Default 200, as published for 4 and 5 bits; the released code takes 20 at 6.
        lam: pull of the singular values towards their mean, above 0. Default 0.003.
        beta: pull towards zero per error energy, above 0. Default 0.001.
        energy: share of the sum of squares of the singular values that makes the head, above 0 and at most 1. Default
            0.8.
        threshold: least condition number of the layers that are changed, above 1. Default 100.

    Raises:
        ConfigError: a value out of range.

    Source: AHCQ-SAM, section on ACNR.
    """

    def __init__(
        self,
        iters: int = 200,
        lam: float = 0.003,
        beta: float = 0.001,
        energy: float = 0.8,
        threshold: float = 100.0,
    ) -> None:
        super().__init__(threshold)
        self.iters = check_whole(self, 'iters', iters)
        self.lam, self.beta = check_number(self, 'lam', lam), check_number(self, 'beta', beta)
        self.energy = check_number(self, 'energy', energy, at_most=1)

    def new_sigma(self, spectrum: Spectrum, gram: Tensor, loop: Any) -> Tensor:
        """Head kept, tail lifted."""
        beta = self.beta * loop.recipe.compat.beta_multiplier
        return lift_tail(spectrum.sigma, spectrum.error_energy(gram), self.iters, self.lam, beta, self.energy)


@SOLVER_HOOKS.register_module()
class CondiQuant(ConditionHook):
    """Bring the singular values closer without looking at where activations err: the baseline of ACNR.

    From the paper: the quantization error of activations is measured by the condition number of the weight, which
    proximal gradient descent on the singular values lowers while the output is kept as far as possible. It was made for
    image super-resolution, and its code is not public. Ours, for want of its details: the error is isotropic, with
    the mean squared error of the layer's input quantizer as its energy along every direction; nearness of the weights
    stands for nearness of the outputs; and the proximal step is the projection onto spectra with the wanted condition
    number, see `ptqsam.condition_number.project_spectrum`. No part of the spectrum is protected.

    Args:
        target: condition number afterwards, above 1 and at most ``threshold``. Default 30, about what the paper
            reports for its model (28).
        beta: pull towards zero per error energy, above 0. Default 0.001.
        threshold: least condition number of the layers that are changed, above 1. Default 100.

    Raises:
        ConfigError: a value out of range.

    Source: CondiQuant (Liu et al., arXiv 2502.15478).
    """

    def __init__(self, target: float = 30.0, beta: float = 0.001, threshold: float = 100.0) -> None:
        super().__init__(threshold)
        self.target = check_number(self, 'target', target, above=1, at_most=self.threshold)
        self.beta = check_number(self, 'beta', beta)

    def new_sigma(self, spectrum: Spectrum, gram: Tensor, loop: Any) -> Tensor:
        """Projected onto the target."""
        error_energy = float(gram.diagonal().mean())
        return project_spectrum(spectrum.sigma, error_energy, self.beta, self.target)


def find_layers(model: nn.Module) -> dict[str, QuantOp]:
    """Linear layers with a quantized input: path -> operator."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, QuantOp) and module.weight.dim() == 2 and isinstance(module.input_quantizer, Quantizer)
    }


def measuring_bytes(op: QuantOp) -> int:
    """Memory of a layer's Gram matrix and kept input, about."""
    width = op.weight.shape[1]
    return 8 * width**2 + 4 * TOKENS * width


def in_groups(layers: Mapping[str, QuantOp]) -> list[dict[str, QuantOp]]:
    """Layers in groups that are measured together, so that Gram matrices and kept inputs fit into memory."""
    groups: list[dict[str, QuantOp]] = []
    room = 0
    for path, op in layers.items():
        if not groups or measuring_bytes(op) > room:
            groups.append({})
            room = MEASURED_TOGETHER
        groups[-1][path] = op
        room -= measuring_bytes(op)
    return groups


def measure(path: str, weight: Tensor) -> float:
    """Condition number of a weight.

    Raises:
        GateError: the weight is NaN or infinite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise GateError(f'{path}.weight: NaN or infinity; check the checkpoint')
    return condition_number(torch.linalg.svdvals(weight.double()))


def measure_input_errors(loop: Any, layers: Mapping[str, QuantOp]) -> dict[str, ErrorGram]:
    """Error of the inputs of some layers over all calibration images, of all processes."""
    errors = {}
    for path, op in layers.items():
        zeros = torch.zeros(op.weight.shape[1], op.weight.shape[1], dtype=torch.float64, device=op.weight.device)
        errors[path] = ErrorGram(zeros)
    compare_inputs(loop, layers, lambda path, x, x_hat: errors[path].add(x, x_hat))
    for error in errors.values():
        all_reduce(error.gram)
        all_reduce(error.tokens)
    return errors


def measure_outputs(loop: Any, layers: Mapping[str, QuantOp], reports: Mapping[str, LayerCondition]) -> None:
    """Fill in the SQNR of the outputs of changed layers, each on the same inputs before and after.

    Args:
        loop: the loop.
        layers: path -> operator, with its new weight where it has one.
        reports: of them.
    """
    weights = {path: (op.original, op.weight) for path, op in layers.items() if op.original is not None}
    sums = {path: torch.zeros(3, 4, dtype=torch.float64, device=new.device) for path, (_, new) in weights.items()}

    def add(path: str, x: Tensor, x_hat: Tensor) -> None:
        old, new = (weight.detach().t() for weight in weights[path])
        wanted = x @ old
        after = x_hat @ new
        pairs = (wanted, x_hat @ old), (wanted, after), (x @ new, after)
        sums[path] += torch.stack([error_sums(*pair) for pair in pairs])

    with original_weights(loop.target):
        compare_inputs(loop, {path: layers[path] for path in weights}, add, SQNR_IMAGES)
    for path, total in sums.items():
        all_reduce(total)
        report = reports[path]
        report.sqnr_before, report.sqnr_after, report.sqnr_own = (error_from_sums(row).sqnr for row in total)


def compare_inputs(
    loop: Any,
    layers: Mapping[str, QuantOp],
    see: Callable[[str, Tensor, Tensor], None],
    images: int | None = None,
) -> None:
    """Run calibration images, with the boxes that calibration uses, once in float and once with quantized activations.

    Args:
        loop: the loop; quantizers of activations are calibrated, those of weights off.
        layers: path -> operator whose inputs are compared.
        see: called with path, input in the float model and quantized input in the other, (tokens, in) each.
        images: only so many. Default None: all.
    """
    calibration, acts = loop.recipe.calibration, act_quantizers(loop.target)
    plain: dict[str, list[Tensor]] = {path: [] for path in layers}

    def keep(path: str, x: Tensor) -> None:
        plain[path].append(x.clone())  # what comes after may change it in place

    def compare(path: str, x_hat: Tensor) -> None:
        see(path, plain[path].pop(0).flatten(0, -2), x_hat.flatten(0, -2))

    passes: tuple[tuple[Mode, Callable[[str, Tensor], None]], ...] = (('off', keep), ('quantize', compare))
    batches = loop.calib_loader if images is None else list(islice(loop.calib_loader, images))
    for _, batch in own_batches(batches, calibration.max_boxes, calibration.seed, 'activation errors'):
        for image, boxes in loop.model.sam_inputs(batch):
            for mode, watch in passes:
                for quantizer in acts:
                    quantizer.mode = mode
                with watch_inputs(layers, watch):
                    embedding = loop.model.encode(image)
                    if len(boxes):
                        loop.model.decode_logits(embedding, boxes)


@contextmanager
def watch_inputs(layers: Mapping[str, QuantOp], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see`` with the path of a layer and what its input quantizer returns, whenever it does."""

    def watcher(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _args, output: see(path, output)

    handles = [op.input_quantizer.register_forward_hook(watcher(path)) for path, op in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
