"""How a recipe says that rounding and scales are learned."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ptqsam.config.base import PARTS, Part, PartName, Schema, UnitLevel

# one image per iteration, with all of its positions and up to 16 boxes
_WHOLE_IMAGES = dict(batch_size=1, tokens_per_step=None, max_boxes=16)
_ABSOLUTE = dict(relative_scale_lr=False, relative_regulariser=False)
_RELATIVE = dict(scale_lr=0.01, relative_scale_lr=True, regulariser=100.0, relative_regulariser=True)
PRESETS: dict[str, dict[str, Any]] = {
    # the settings of PTQ4SAM, AHCPTQ and AHCQ-SAM (methods.md 1.5)
    'paper': dict(iters=20000, weight_lr=1e-3, scale_lr=4e-5, regulariser=0.01, **_WHOLE_IMAGES, **_ABSOLUTE),
    # those of SAQ-SAM, whose released code has no regulariser
    'paper_saq': dict(iters=2000, weight_lr=1e-3, scale_lr=2e-3, regulariser=0.02, **_WHOLE_IMAGES, **_ABSOLUTE),
    # chosen on units of MobileSAM by the error on calibration images that were held out (docs/reconstruction.md)
    'fast': dict(iters=200, batch_size=4, tokens_per_step=1024, max_boxes=4, weight_lr=0.1, **_RELATIVE),
    # likewise, for units that need whole images (docs/saq_sam.md): fewer and larger steps
    'fast_stage': dict(iters=60, weight_lr=0.3, **_WHOLE_IMAGES | dict(max_boxes=4), **_RELATIVE),
}


class Cache(Schema):
    """Where the activations that reconstruction learns from are kept.

    Attributes:
        store: device (that of the model), host or disk memory; auto takes the first of these with enough room.
        dtype: of the stored values; computation is in float32.
    """

    store: Literal['auto', 'device', 'host', 'disk'] = 'auto'
    dtype: Literal['float32', 'bfloat16'] = 'float32'


class PartReconstruction(Schema):
    """What is different in the reconstruction of one part of SAM; None: nothing.

    Attributes:
        enabled: False: the weights of the part are rounded to nearest, its scales stay as calibrated.
        unit: smallest thing reconstructed.
        iters: iterations per unit.
        loss: reconstruction loss.
        weight_lr: learning rate of the rounding variables.
    """

    enabled: bool = True
    unit: UnitLevel | None = None
    iters: int | None = Field(default=None, ge=1)
    loss: Part | None = None
    weight_lr: float | None = Field(default=None, gt=0)


class Reconstruction(Schema):
    """How the rounding of weights and the scales of activations are learned (methods.md 1.5).

    Attributes:
        preset: where what is left out comes from (`PRESETS`).
        unit: smallest thing reconstructed.
        activations: quantize activations meanwhile and learn their scales; False: weights only, as AdaRound and BRECQ.
        loss: reconstruction loss.
        drift_correction: the targets of a segment of the encoder (stage or block) are what the float model makes of the
            quantized model's input, those of the decoder what it makes of the quantized image embedding; errors made
            before are left alone then.
        encoder: what is different in the image encoder.
        decoder: what is different in the mask decoder.
        drop_prob: probability of keeping the quantized value (QDrop's name); 1 drops nothing.
        regulariser: weight of the rounding regulariser.
        relative_regulariser: multiply it by the loss of nearest rounding per weight of the unit. The losses of the
            units of one model differ by five orders of magnitude, so a fixed weight decides everything in one unit
            and nothing in the next.
        warm_up: share of the iterations without regulariser.
        b_range: exponent of the regulariser after the warm-up and at the end.
        iters: iterations per unit.
        batch_size: images per iteration.
        tokens_per_step: positions per iteration (tokens, whole windows, query rows or crops), over all images; None:
            all positions of the images.
        max_boxes: prompt boxes per image, drawn at random among those of the calibration.
        weight_lr: learning rate of the rounding variables (Adam).
        scale_lr: learning rate of the scales of activations (Adam, cosine to zero).
        relative_scale_lr: multiply it by the scale that calibration gave.
        cache: where activations are kept.
    """

    preset: Literal['paper', 'fast', 'paper_saq', 'fast_stage'] = 'fast'
    unit: UnitLevel = 'module'
    activations: bool = True
    loss: Part = Part(type='SquaredError')
    drift_correction: bool = False
    encoder: PartReconstruction = PartReconstruction()
    decoder: PartReconstruction = PartReconstruction()
    drop_prob: float = Field(default=0.5, gt=0, le=1)
    regulariser: float = Field(ge=0)
    relative_regulariser: bool
    warm_up: float = Field(default=0.2, ge=0, lt=1)
    b_range: tuple[float, float] = Field(default=(20.0, 2.0), strict=False)
    iters: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    tokens_per_step: int | None = Field(ge=16)
    max_boxes: int = Field(ge=1)
    weight_lr: float = Field(gt=0)
    scale_lr: float = Field(ge=0)
    relative_scale_lr: bool
    cache: Cache = Cache()

    @model_validator(mode='before')
    @classmethod
    def complete(cls, raw: Any) -> Any:
        """Take from the preset what is left out."""
        if not isinstance(raw, dict):
            return raw
        preset = raw.get('preset', 'fast')
        return (PRESETS.get(preset, {}) if isinstance(preset, str) else {}) | raw

    @field_validator('b_range')
    @classmethod
    def exponent_falls(cls, value: tuple[float, float]) -> tuple[float, float]:
        """Refuse an exponent that would pull variables away from 0 and 1 at the end, or has no gradient."""
        if not value[0] >= value[1] >= 1:
            raise ValueError('the exponent has to fall, and to end at 1 or more')
        return value

    @model_validator(mode='after')
    def something_is_left(self) -> Self:
        """Refuse a reconstruction of nothing."""
        if not self.parts:
            raise ValueError('both parts are disabled; leave out the section (reconstruction=None), or enable one')
        return self

    @property
    def parts(self) -> list[PartName]:
        """Parts of SAM that are reconstructed."""
        return [part for part in PARTS if getattr(self, part).enabled]

    def of(self, part: PartName) -> Self:
        """Settings with what is different in a part."""
        own: PartReconstruction = getattr(self, part)
        return self.model_copy(update={name: value for name, value in own if name != 'enabled' and value is not None})
