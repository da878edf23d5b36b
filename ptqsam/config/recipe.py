"""The recipe: a typed schema of the quant YAML."""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from ptqsam.config.base import PARTS, Part, Schema
from ptqsam.config.reconstruction import Reconstruction


class PartBits(Schema):
    """Bit widths of a part of the model; what is left out is as for the whole."""

    weight: int | None = Field(default=None, ge=2, le=8)
    act: int | None = Field(default=None, ge=2, le=8)

    @model_validator(mode='after')
    def says_something(self) -> Self:
        """Refuse an empty section."""
        if self.weight is None and self.act is None:
            raise ValueError('the section is empty; give weight or act, or leave it out')
        return self


class Bits(Schema):
    """Bit widths that quantizers have unless a rule says otherwise.

    Attributes:
        weight: of weights.
        act: of activations.
        encoder: of the image encoder, where they differ.
        decoder: of the mask decoder and the prompt encoder, where they differ.
    """

    weight: int = Field(ge=2, le=8)
    act: int = Field(ge=2, le=8)
    encoder: PartBits | None = None
    decoder: PartBits | None = None

    def given(self, part: str) -> dict[str, int]:
        """Bit widths that a part has of its own: `weight` and `act` as far as they are given."""
        section: PartBits | None = getattr(self, part) if part in PARTS else None
        return {kind: bits for kind, bits in section or () if bits is not None}

    def resolved(self) -> dict[str, Any]:
        """Bit widths for reports: `weight` and `act`, and both of them for every part that differs in any."""
        whole = dict(weight=self.weight, act=self.act)
        parts = {part: whole | self.given(part) for part in PARTS}
        return whole | {part: bits for part, bits in parts.items() if bits != whole}


class Rule(Schema):
    """Settings for the quantizers that ``match`` names. Of several matching rules the later one wins, field by field.

    Attributes:
        match: glob over quantizer paths (``image_encoder.*.softmax``) or, after ``role:``, over roles
            (``role:mlp.lin2.input``), or a list of such. ``*`` also matches dots.
        enabled: whether the place is quantized at all.
        bits: bit width in place of ``bits.weight`` or ``bits.act``.
        quantizer: quantizer to build, default ``{type: Uniform}``.
        observer: observer in place of ``calibration.observer``.
    """

    match: tuple[str, ...] = Field(strict=False, min_length=1)
    enabled: bool | None = None
    bits: int | None = Field(default=None, ge=2, le=8)
    quantizer: Part | None = None
    observer: Part | None = None

    @field_validator('match', mode='before')
    @classmethod
    def one_glob_is_a_list_of_one(cls, value: Any) -> Any:
        """Accept a glob in place of a list."""
        return (value,) if isinstance(value, str) else value

    @model_validator(mode='after')
    def settings_stand_where_they_belong(self) -> Self:
        """Refuse a rule that says nothing, and settings that the rule or the quantizer decides."""
        if all(value is None for name, value in self if name != 'match'):
            raise ValueError('the rule has no effect; give enabled, bits, quantizer or observer')
        for part, own in ((self.quantizer, ('bits', 'observer')), (self.observer, ('bits', 'symmetric', 'ch_axis'))):
            for key in own:
                if part is not None and key in part.kwargs():
                    place = 'the quantizer' if key in ('symmetric', 'ch_axis') else 'the rule'
                    raise ValueError(f"'{key}' of {part.type} belongs to {place}")
        return self


class Observers(Schema):
    """Observers for weights and for activations."""

    weight: Part = Part(type='MinMax')
    act: Part = Part(type='AvgMinMax')

    @field_validator('weight', 'act')
    @classmethod
    def settings_stand_where_they_belong(cls, value: Part) -> Part:
        """Refuse settings that the quantizer decides."""
        for key in ('bits', 'symmetric', 'ch_axis'):
            if key in value.kwargs():
                raise ValueError(f"'{key}' of {value.type} is that of the quantizer; leave it out")
        return value


class Calibration(Schema):
    """What the observers see.

    Attributes:
        num_images: images drawn at random from the train split (papers: 32).
        max_boxes: at most this many prompt boxes per image, drawn at random; bounds memory.
        seed: seed of both draws.
        observer: observers to use.
    """

    num_images: int = Field(default=32, ge=1)
    max_boxes: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    observer: Observers = Observers()


# compat switch -> quantizer that has a published variant
PUBLISHED_QUANTIZERS = {
    'published_agq': 'AGQ',
    'published_lnq': 'LNQ',
    'published_hluq': 'HLUQ',
    'published_cag': 'CAG',
}


class Compat(Schema):
    """Switches that reproduce defects of published code. A run with any of them is stamped and writes no checkpoint.

    Attributes:
        keep_drop_prob: inputs of linear and conv layers go on dropping quantization after reconstruction (defect D1).
        soft_weights: only the first layer of each unit is hardened, the others keep soft weights (D2).
        first_images: calibrate on the first images in annotation order (D6).
        loss_dim1: sum the loss over dimension 1, whatever it is (D5).
        big_observer: BIG changes the observer of all keys of the decoder.
        published_agq: AGQ has 2^b + 1 levels.
        published_lnq: LNQ has 2^b + 1 levels, and was searched for 2^b.
        published_hluq: HLUQ throws large values onto its knee, spends two codes on it and does not reach the maximum.
        published_cag: channels are grouped by raw scale and zero point, learning starts over at every regrouping, and
            statistics alone do not group at all.
        beta_multiplier: multiplies beta of ACNR; the released code counts the activation error twice, which is 2.
    """

    keep_drop_prob: bool = False
    soft_weights: bool = False
    first_images: bool = False
    loss_dim1: bool = False
    big_observer: bool = False
    published_agq: bool = False
    published_lnq: bool = False
    published_hluq: bool = False
    published_cag: bool = False
    beta_multiplier: float = Field(default=1.0, gt=0, strict=False)

    @property
    def active(self) -> list[str]:
        """Names of the switches that are on."""
        return [name for name, value in self if value != type(self).model_fields[name].default]


class QuantConfig(Schema):
    """A recipe.

    Attributes:
        algorithm: name for reports; behaviour comes from the parts below.
        bits: default bit widths.
        rules: ordered, later wins; applied after the built-in exclusions (ptqsam/solver/rules.py).
        hooks: solver hooks (published ideas), in order.
        calibration: images and observers.
        reconstruction: how rounding and scales are learned; None: statistics only.
        compat: switches that reproduce published defects.
    """

    algorithm: str
    bits: Bits
    rules: tuple[Rule, ...] = Field(default=(), strict=False)
    hooks: tuple[Part, ...] = Field(default=(), strict=False)
    calibration: Calibration = Calibration()
    reconstruction: Reconstruction | None = None
    compat: Compat = Compat()

    @model_validator(mode='after')
    def switches_have_an_effect(self) -> Self:
        """Refuse a compat switch that changes nothing, since it would cost the checkpoint."""
        hooks, quantizers = {hook.type for hook in self.hooks}, {r.quantizer.type for r in self.rules if r.quantizer}
        active, learning = self.compat.active, {'reconstruction'} if self.reconstruction else set()
        needs = {
            'keep_drop_prob': ('reconstruction', learning),
            'soft_weights': ('reconstruction', learning),
            'loss_dim1': ('reconstruction', learning),
            'big_observer': ('BimodalIntegration', hooks),
            'beta_multiplier': ('ConditionNumberReduction', hooks),
            **{switch: (name, quantizers) for switch, name in PUBLISHED_QUANTIZERS.items()},
        }
        for switch, (part, there) in needs.items():
            if switch in active and part not in there:
                kind = 'a rule with ' if there is quantizers else 'the hook ' if there is hooks else ''
                raise ValueError(f'compat.{switch} has no effect without {kind}{part}; leave it out')
        return self

    def plain(self) -> dict[str, Any]:
        """The recipe as plain dicts and lists, for manifests and fingerprints."""
        return self.model_dump(mode='json')
