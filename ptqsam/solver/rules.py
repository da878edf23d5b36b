"""Rules: which quantizer goes where. Ordered globs over paths and roles; the later rule wins, field by field."""

import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ptqsam.config import Part, QuantConfig, Rule
from ptqsam.errors import ConfigError
from ptqsam.quantizers import Quantizer
from ptqsam.registry import OBSERVERS, OURS, QUANTIZERS, build_part, check_part

# The papers leave these in floating point (methods.md 1.3). A recipe's rule with `enabled: true` takes one back in.
BUILT_IN_RULES = (
    Rule(match=('*',), enabled=True),
    Rule(match=('image_encoder.patch_embed.*',), enabled=False),
    Rule(match=('prompt_encoder.*',), enabled=False),
    Rule(match=('role:norm.*',), enabled=False),
    Rule(match=('mask_decoder.output_hypernetworks_mlps.*',), enabled=False),
    Rule(match=('mask_decoder.iou_prediction_head.*',), enabled=False),
    Rule(match=('mask_decoder.output_upscaling.*',), enabled=False),
)

# what a recipe calls the parts of the model (`bits.decoder`)
PART_GLOBS = {'encoder': ('image_encoder.*',), 'decoder': ('mask_decoder.*', 'prompt_encoder.*')}


@dataclass(frozen=True)
class Point:
    """A place in the model where a quantizer can sit.

    Attributes:
        path: for example ``image_encoder.blocks.0.attn.qkv.input``.
        role: what the tensor is, for example ``encoder.attn.qkv.input``; the same in every model of the family.
        kind: ``weight`` or ``act``.
        ch_axis: channel axis for per-channel parameters, None for one set per tensor.
    """

    path: str
    role: str
    kind: str
    ch_axis: int | None = None


@dataclass(frozen=True)
class Choice:
    """What the rules decided for one point.

    Attributes:
        point: the place.
        enabled: quantized or left in floating point.
        bits: bit width.
        quantizer: quantizer to build.
        observer: observer to build.
        rule: the last rule that matched, with its glob that did, or `bits.decoder.act` and the like where none of the
            recipe's did; of a place that is left out, the rule that says so. For the summary.
    """

    point: Point
    enabled: bool
    bits: int
    quantizer: Part
    observer: Part
    rule: str

    def build_args(self) -> dict[str, Any]:
        """Config dict for the QUANTIZERS registry."""
        observer = dict(type=self.observer.type, **self.observer.kwargs())
        args = dict(ch_axis=self.point.ch_axis) | self.quantizer.kwargs()
        return dict(type=self.quantizer.type, bits=self.bits, observer=observer, **args)


def matches(rule: Rule, point: Point) -> bool:
    """Whether one of a rule's globs names a point, by path or by ``role:``."""
    return any(glob_matches(glob, point) for glob in rule.match)


def glob_matches(glob: str, point: Point) -> bool:
    """Whether a glob names a point, by path or by ``role:``."""
    if glob.startswith('role:'):
        return fnmatchcase(point.role, glob.removeprefix('role:'))
    return fnmatchcase(point.path, glob)


def part_of(point: Point) -> str:
    """Part of the model that a point belongs to: a key of `PART_GLOBS`, or ''."""
    return next((part for part, globs in PART_GLOBS.items() if any(glob_matches(glob, point) for glob in globs)), '')


def misfit(choice: Choice) -> str:
    """What is wrong with a quantizer at the place that it was chosen for; '' if nothing is, or none is built."""
    point, part = choice.point, choice.quantizer
    kind: type[Quantizer] | None = QUANTIZERS.get(part.type)
    if kind is None or not choice.enabled:
        return ''
    if kind.places is not None and point.kind == 'weight':
        return f'{part.type} is for activations, and matches the weight {point.path}; leave Uniform for weights'
    return kind.misfit(point.role, part.kwargs().get('ch_axis'))


def count_bits(choices: Iterable[Choice]) -> dict[str, dict[str, int]]:
    """For weights and activations, bits -> quantizers."""
    counts = Counter((choice.point.kind, choice.bits) for choice in choices)
    return {
        kind: {str(bits): count for (of, bits), count in sorted(counts.items()) if of == kind}
        for kind in ('weight', 'act')
    }


def select_points(choices: Sequence[Choice], globs: Sequence[str]) -> list[Choice]:
    """The decisions for points that one of some globs names, in their order; all of them if there are no globs.

    Args:
        choices: what the rules decided.
        globs: over paths, or after `role:` over roles.

    Raises:
        ConfigError: a glob names none, with the nearest path or role.
    """
    for glob in globs:
        if not any(glob_matches(glob, choice.point) for choice in choices):
            raise ConfigError(f"'{glob}' matched none of {len(choices)} quantizers{nearest(glob, choices)}")
    return [choice for choice in choices if not globs or any(glob_matches(glob, choice.point) for glob in globs)]


def nearest(glob: str, choices: Iterable[Choice]) -> str:
    """A path or role that a glob may have meant, in words."""
    by_role = glob.startswith('role:')
    known = [f'role:{c.point.role}' if by_role else c.point.path for c in choices]
    near = difflib.get_close_matches(glob, known, n=1, cutoff=0.0)
    return f"; nearest: '{near[0]}'" if near else ''


class RuleBook:
    """The built-in exclusions and a recipe's rules, and a record of what they decided.

    Args:
        config: the recipe.

    Raises:
        ConfigError: the recipe names a quantizer or an observer that does not exist, or an argument that it lacks.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.rules = (*BUILT_IN_RULES, *config.rules)
        self.choices: list[Choice] = []
        self._check_parts()

    def decide(self, point: Point) -> Choice:
        """Apply all rules to a point and record the result.

        Args:
            point: a place that can be quantized.

        Returns:
            The merged settings of all matching rules.

        Raises:
            ConfigError: a rule puts a quantizer where it makes no sense.
        """
        defaults, part, bits = self.config.calibration.observer, part_of(point), self.config.bits
        own_bits = bits.given(part)
        settings: dict[str, Any] = dict(
            enabled=True,
            bits=own_bits.get(point.kind, bits.weight if point.kind == 'weight' else bits.act),
            quantizer=Part(type='Uniform'),
            observer=defaults.weight if point.kind == 'weight' else defaults.act,
        )
        section = f'bits.{part}.{point.kind}' if point.kind in own_bits else ''
        winner = switch = chooser = ''
        for index, rule in enumerate(self.rules):
            if glob := next((glob for glob in rule.match if glob_matches(glob, point)), None):
                settings |= {k: v for k in settings if (v := getattr(rule, k)) is not None}
                name = self._name(index, glob)
                # bits of a part come after the built-in rules and before the recipe's
                winner = section if section and index < len(BUILT_IN_RULES) else name
                switch = name if rule.enabled is not None else switch
                chooser = name if rule.quantizer is not None else chooser
        # of a place that is left out, the rule that says so counts, not a later one about bits
        kind = QUANTIZERS.get(settings['quantizer'].type)
        if kind is not None and kind.own_observer:
            settings['observer'] = Part(type=kind.own_observer)
        choice = Choice(point=point, rule=winner if settings['enabled'] else switch, **settings)
        if wrong := misfit(choice):
            raise ConfigError(f'{chooser}: {wrong}')
        self.choices.append(choice)
        return choice

    @property
    def enabled(self) -> list[Choice]:
        """Decisions that put a quantizer somewhere."""
        return [choice for choice in self.choices if choice.enabled]

    def bit_counts(self) -> dict[str, Any]:
        """How much is quantized: points in all, and for weights and activations, bits -> quantizers.

        The same again, without the points, for each part that has other bits than the whole.
        """
        parts = [part for part in PART_GLOBS if part in self.config.bits.resolved()]
        inside = {part: [choice for choice in self.enabled if part_of(choice.point) == part] for part in parts}
        each = {part: count_bits(choices) for part, choices in inside.items()}
        return dict(points=len(self.choices), **count_bits(self.enabled), **each)

    def counts(self) -> list[tuple[str, int]]:
        """For each part's bits and each of the recipe's rules, the name and how many points it matches."""
        first, points = len(BUILT_IN_RULES), [choice.point for choice in self.choices]
        places = Counter((part_of(point), point.kind) for point in points)
        sections = [
            (f'bits.{part}.{kind}', places[part, kind]) for part in PART_GLOBS for kind in self.config.bits.given(part)
        ]
        return sections + [
            (self._name(first + i), sum(matches(rule, point) for point in points))
            for i, rule in enumerate(self.config.rules)
        ]

    def check(self) -> None:
        """Refuse a rule that matches nothing and a recipe that quantizes nothing.

        Raises:
            ConfigError: with the nearest path or role.
        """
        for index, rule in enumerate(self.config.rules):
            for glob in rule.match:
                if not any(glob_matches(glob, choice.point) for choice in self.choices):
                    near = nearest(glob, self.choices)
                    raise ConfigError(f"rule {index + 1} '{glob}' matched none of {len(self.choices)} quantizers{near}")
        if not self.enabled:
            raise ConfigError(
                f"recipe '{self.config.algorithm}' quantizes nothing: its rules disable all {len(self.choices)} "
                'quantizers; enable some with `enabled: true`'
            )

    def _check_parts(self) -> None:
        """Refuse quantizers and observers that do not exist, also of rules for places where none is built.

        Raises:
            ConfigError: with the rule, or the key of the recipe.
        """
        defaults = self.config.calibration.observer
        parts: list[tuple[str, Part | None, Part | None]]
        parts = [(f'calibration.observer.{kind}', None, part) for kind, part in defaults]
        parts += [(self._name(index), rule.quantizer, rule.observer) for index, rule in enumerate(self.rules)]
        for where, quantizer, observer in parts:
            try:
                if quantizer is not None:
                    check_part(QUANTIZERS, quantizer.type, **(dict.fromkeys(OURS['quantizer']) | quantizer.kwargs()))
                if observer is not None:
                    # what else it takes comes from its quantizer
                    settings = dict(bits=8, symmetric=False, ch_axis=None)
                    build_part(OBSERVERS, observer.type, **settings, **observer.kwargs())
            except ConfigError as error:
                raise ConfigError(f'{where}: {error}') from None

    def _name(self, index: int, glob: str | None = None) -> str:
        """A rule with all its globs, or with the one that counts."""
        own, globs = index - len(BUILT_IN_RULES) + 1, glob or ', '.join(self.rules[index].match)
        return f"rule {own} '{globs}'" if own >= 1 else f"built-in '{globs}'"
