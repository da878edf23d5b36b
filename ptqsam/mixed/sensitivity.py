"""The table of `tools/analyze.py`: what quantizing one tensor alone, to so many bits, does to the masks."""

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ptqsam.errors import AssetError
from ptqsam.mixed.products import Product

# loss -> column that it follows from
COLUMNS = dict(noise='enabled_sqnr_db', iou='enabled_iou')
ADVICE = 'make it with tools/analyze.py from the same model and recipe'


@dataclass
class Sensitivity:
    """Losses of quantizers that are on alone.

    Attributes:
        losses: path -> bits -> loss.
    """

    losses: dict[str, dict[int, float]] = field(default_factory=dict)

    def loss(self, product: Product, widths: Sequence[int]) -> float:
        """Loss of a product: the sum of its factors', as if their errors were independent."""
        return sum(self.losses[factor.path][bits] for factor, bits in zip(product.factors, widths, strict=True))

    @property
    def bits(self) -> list[int]:
        """Bit widths that every quantizer was measured at, ascending."""
        return sorted(set.intersection(*(set(losses) for losses in self.losses.values())))

    def common_bits(self, path: Path) -> list[int]:
        """The same, of which there has to be one.

        Args:
            path: of the table, for messages.

        Raises:
            AssetError: there is none.
        """
        if not self.bits:
            raise AssetError(
                f'{path}: no bit width was measured for all quantizers; name those to choose from with --candidates, '
                'or measure more (tools/analyze.py --bits)'
            )
        return self.bits


def read_sensitivity(path: Path, loss: str = 'noise') -> Sensitivity:
    """Read a sensitivity table.

    Args:
        path: CSV file.
        loss: 'noise': power of the error of the mask logits over that of the logits, 10^(-SQNR / 10); 'iou': 1 - IoU
            of the masks with those of the float model. Default 'noise'.

    Returns:
        The table.

    Raises:
        AssetError: missing, not such a table, or a value that is no number.
    """
    try:
        with path.open(encoding='utf-8', newline='') as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError:
        raise AssetError(f'{path}: no such sensitivity table; {ADVICE}') from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise AssetError(f'{path}: cannot read this sensitivity table ({error})') from None
    missing = [name for name in ('path', 'bits', COLUMNS[loss]) if name not in (reader.fieldnames or ())]
    if missing or not rows:
        raise AssetError(
            f'{path}: no sensitivity table: {f"lacks column {missing[0]!r}" if missing else "no rows"}; {ADVICE}'
        )
    table = Sensitivity()
    for line, row in enumerate(rows, 2):
        try:
            table.losses.setdefault(row['path'], {})[int(row['bits'])] = loss_of(row, loss)
        except (ValueError, TypeError, OverflowError):
            raise AssetError(f'{path}: line {line} has a value that is no number, {row}; {ADVICE}') from None
    return table


def loss_of(row: dict[str, str], loss: str) -> float:
    """Loss of one row.

    Raises:
        ValueError: no number, or NaN.
    """
    value = float(row[COLUMNS[loss]])
    if math.isnan(value):
        raise ValueError('NaN')
    return 10 ** (-value / 10) if loss == 'noise' else 1 - value


def check_sensitivity(path: Path, table: Sensitivity, needed: Mapping[str, Collection[int]]) -> None:
    """Refuse a table that does not say how the quantizers of a model do with what may be chosen.

    Args:
        path: of the table, for messages.
        table: its content.
        needed: path of each quantizer of the model -> bit widths that may be chosen.

    Raises:
        AssetError: made for another model or recipe, or lacks bit widths.
    """
    absent, foreign = sorted(needed.keys() - table.losses.keys()), sorted(table.losses.keys() - needed.keys())
    if absent or foreign:
        example = f'lacks {absent[0]}' if absent else f'has {foreign[0]}, which is not quantized here'
        raise AssetError(
            f'{path}: is of another model or recipe: it has {len(needed) - len(absent)} of {len(needed)} quantizers '
            f'and {len(foreign)} others, for example it {example}; {ADVICE}'
        )
    for name, widths in needed.items():
        if lacking := sorted(set(widths) - table.losses[name].keys()):
            raise AssetError(
                f'{path}: {name} was not measured at {lacking[0]} bits; choose other --candidates '
                f'(all rows have {" ".join(map(str, table.bits)) or "none in common"}), or measure more'
            )
