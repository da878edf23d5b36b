"""An allocation as an ordinary recipe: the base recipe's rules, then bits for what differs from it."""

import os
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ptqsam.config import QuantConfig
from ptqsam.solver.rules import Choice, Point, glob_matches

WIDTH = 120


def recipe_text(
    path: Path,
    base: Path,
    config: QuantConfig,
    choices: Sequence[Choice],
    bits: Mapping[str, int],
    comment: Sequence[str],
) -> str:
    """The recipe.

    Args:
        path: where it will lie.
        base: the recipe that it inherits from.
        config: content of that.
        choices: its quantizers and all places that it leaves out.
        bits: path of a quantizer -> bits.
        comment: lines at its head.

    Returns:
        YAML.
    """
    lines = [f'# {line}' if line else '#' for line in comment]
    relative = Path(os.path.relpath(base.resolve(), path.resolve().parent)).as_posix()
    lines += [f'_base_: {relative}', f'algorithm: {path.resolve().parent.name}/{path.stem}', 'rules:']
    if config.rules:
        lines.append('  # a list replaces that of the _base_, so its rules stand here again')
        lines += [f'  - {inline(rule.model_dump(mode="json", exclude_none=True))}' for rule in config.rules]
    points = [choice.point for choice in choices]
    enabled = [choice for choice in choices if choice.enabled]
    for width in sorted(set(bits.values())):
        wanted = [choice.point for choice in enabled if bits[choice.point.path] == width != choice.bits]
        # what has these bits anyway, or is left out, may be named as well
        harmless = {c.point.path for c in choices if not c.enabled or bits[c.point.path] == width == c.bits}
        if wanted:
            weights = sum(point.kind == 'weight' for point in wanted)
            lines.append(f'  # {weights} weights and {len(wanted) - weights} activations')
            lines += rule_lines(shortest_globs(wanted, points, harmless), width)
    if lines[-1] == 'rules:':
        lines[-1] = 'rules: []'
    return '\n'.join(lines) + '\n'


def inline(value: Any) -> str:
    """A value as YAML in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False).strip().removesuffix('\n...')


def rule_lines(globs: Sequence[str], bits: int) -> list[str]:
    """A rule with many globs as YAML."""
    names = [f"'{glob}'" for glob in globs]
    match = names[0] if len(names) == 1 else f'[{", ".join(names)}]'
    if len(one := f'  - {{match: {match}, bits: {bits}}}') <= WIDTH:
        return [one]
    return [f'  - bits: {bits}', '    match:', *(f'      - {name}' for name in names)]


def shortest_globs(wanted: Sequence[Point], points: Sequence[Point], harmless: Collection[str]) -> list[str]:
    """Globs that name some points and nothing that may not be named, chosen greedily.

    Args:
        wanted: what they must name.
        points: all of the model.
        harmless: paths that they may name as well.

    Returns:
        Roles and patterns first, those of most points before others, then single paths in order.
    """
    left = {point.path: point for point in wanted}
    allowed = {*left, *harmless}
    reach: dict[str, set[str]] = {}
    for glob in sorted({glob for point in wanted for glob in candidate_globs(point)}):
        named = {point.path for point in points if glob_matches(glob, point)}
        if named <= allowed and len(named & left.keys()) > 1:
            reach[glob] = named & left.keys()
    globs = []
    while reach:
        best = max(reach, key=lambda glob: (len(reach[glob]), -len(glob), glob))
        globs.append(best)
        for path in reach[best]:
            left.pop(path)
        reach = {glob: rest for glob, named in reach.items() if len(rest := named & left.keys()) > 1}
    return [*globs, *left]


def candidate_globs(point: Point) -> list[str]:
    """Globs that name a point and perhaps others: its role, all below a module of its, and those of one kind below."""
    words = point.path.split('.')
    heads = ['.'.join(words[:count]) for count in range(1, len(words) - 1)]
    tails = ['.'.join(words[-count:]) for count in (1, 2)]
    return [
        f'role:{point.role}',
        *(f'{head}.*' for head in heads),
        *(f'{head}.*.{tail}' for head in heads for tail in tails if fnmatchcase(point.path, f'{head}.*.{tail}')),
    ]
