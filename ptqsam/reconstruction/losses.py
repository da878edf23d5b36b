"""How far the outputs of a quantized unit are from those of the float unit."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ptqsam.checks import check_number
from ptqsam.config import Part, Reconstruction
from ptqsam.modules.unit_kinds import QUERIES
from ptqsam.registry import RECON_LOSSES, build_part


@RECON_LOSSES.register_module()
class SquaredError:
    """Squared error, summed over channels and averaged over everything else. Methods.md 1.5 step 3.

    It has no state: one call per iteration takes all outputs of the unit. The released code counts its calls to know
    the iteration, and is called once per output (D4); and it sums over axis 1, which is channels only for
    (B, C, H, W) (D5).
    """

    # whether units are followed to the tokens that have met the prompts (ptqsam/reconstruction/prompts.py)
    prompt_aware: ClassVar[bool] = False

    def __call__(
        self,
        outputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        channel_axes: Sequence[int],
        valid: Tensor | None = None,
    ) -> Tensor:
        """Loss of one iteration.

        Args:
            outputs: of the quantized unit, any layout.
            targets: of the float unit, same shapes.
            channel_axes: channel axis of each output.
            valid: bool, shape of the only output without its channel axis: positions that count. Default all.

        Returns:
            0-dim, summed over outputs.

        Raises:
            ValueError: numbers of outputs, targets and axes differ, or `valid` comes with several outputs.
        """
        if valid is not None and len(outputs) != 1:
            raise ValueError(f'valid positions belong to a single output, but there are {len(outputs)}')
        terms = [_term(*pair, valid) for pair in zip(outputs, targets, channel_axes, strict=True)]
        return sum(terms[1:], start=terms[0])


@RECON_LOSSES.register_module()
class PromptAware(SquaredError):
    """Squared error of what the prompts make of a unit's output (PAR of SAQ-SAM). Methods.md 4.2.

    A stage of the encoder: ``alpha * tokens + stage * r * output``; tokens are the image tokens that leave the two-way
    transformer, r is the ratio of the mean squares of the targets of both.
    A layer of that transformer: ``alpha * tokens + beta * (queries_weight * queries + keys)``; tokens are its final
    queries. Other units (neck, final attention): the squared error of their output.

    The paper has the stage's own error in the loss of the encoder, the released code computes it and leaves it out.

    Args:
        alpha: weight of the tokens that have met the prompts, above 0. Default 1.
        beta: weight of the outputs of a layer of the two-way transformer. Default 1.
        queries_weight: weight of the queries among them. Default 0.01.
        stage: weight of the output of a stage of the encoder. Default 1; the released code: 0.

    Raises:
        ConfigError: a weight below 0, or alpha of 0.
    """

    prompt_aware = True

    def __init__(self, alpha: float = 1.0, beta: float = 1.0, queries_weight: float = 0.01, stage: float = 1.0) -> None:
        self.alpha = check_number(self, 'alpha', alpha)
        self.beta = check_number(self, 'beta', beta, at_least=0)
        self.queries_weight = check_number(self, 'queries_weight', queries_weight, at_least=0)
        self.stage = check_number(self, 'stage', stage, at_least=0)

    def __call__(
        self,
        outputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        channel_axes: Sequence[int],
        valid: Tensor | None = None,
        followed_to: int | None = None,
    ) -> Tensor:
        """Loss of one iteration.

        Args:
            outputs: of the quantized unit and, if it is followed, the tokens that have met the prompts as the last one.
            targets: of the float unit, same shapes.
            channel_axes: channel axis of each output.
            valid: as in `SquaredError`.
            followed_to: which output of the two-way transformer these are; None: the unit is not followed.

        Returns:
            0-dim.
        """
        if followed_to is None:
            return super().__call__(outputs, targets, channel_axes, valid)
        terms = list(zip(outputs, targets, channel_axes, strict=True))
        *own, tokens = (_term(*term, None) for term in terms)
        if followed_to == QUERIES:
            queries, keys = own
            return self.alpha * tokens + self.beta * (self.queries_weight * queries + keys)
        if not self.stage:
            return self.alpha * tokens
        # features and tokens differ in size by orders of magnitude; so, equal relative errors count the same
        size, *_, tokens_size = (_energy(target, axis) for _, target, axis in terms)
        return self.alpha * tokens + self.stage * (tokens_size / size.clamp(min=1e-30)) * own[0]


def _energy(x: Tensor, axis: int) -> Tensor:
    """Squares, summed over channels and averaged over everything else."""
    return x.float().square().mean() * x.shape[axis]


def _term(output: Tensor, target: Tensor, axis: int, valid: Tensor | None) -> Tensor:
    """Squared error of one output."""
    output, target = output.float(), target.float()
    if valid is None:
        # the sum over one axis and the mean over the others, without a tensor in between
        return F.mse_loss(output, target, reduction='sum') * (output.shape[axis] / output.numel())
    error = F.mse_loss(output, target, reduction='none').sum(axis)
    # no boolean index: it would make the host wait for the number of positions
    return (error * valid).sum() / valid.sum().clamp(min=1)


def make_loss(settings: Reconstruction) -> Any:
    """Build the reconstruction loss of a recipe.

    Args:
        settings: its section.

    Raises:
        ConfigError: unknown loss, or arguments that it refuses.
    """
    return build_part(RECON_LOSSES, settings.loss.type, **settings.loss.kwargs())


def follows_prompts(settings: Reconstruction) -> bool:
    """Whether the loss of a recipe, in some part of SAM that is reconstructed, follows units to the prompts."""
    return any(is_prompt_aware(settings.of(part).loss) for part in settings.parts)


def is_prompt_aware(loss: Part) -> bool:
    """Whether a loss looks at tokens that have met the prompts; one of somebody else may know nothing of them."""
    return getattr(RECON_LOSSES.get(loss.type), 'prompt_aware', False)
