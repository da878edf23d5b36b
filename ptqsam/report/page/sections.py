"""The sections about one run, and which file each comes from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptqsam.checkpoint import MANIFEST
from ptqsam.errors import AssetError
from ptqsam.report.gallery import INDEX
from ptqsam.report.page import analysis, methods
from ptqsam.report.page.blocks import Block, Line, Section, Table, Value
from ptqsam.report.page.charts import stages
from ptqsam.report.page.commands import analysis_command, masks_command, run_command
from ptqsam.report.page.pictures import Album
from ptqsam.sweep.records import Record


@dataclass(frozen=True)
class Source:
    """Where a section comes from.

    Attributes:
        title: of the section.
        file: below the work dir; without it there is no section.
        meaning: what the numbers mean.
        make: from the file's path to what is shown.
        command: from the run to the command that makes the file; None: every run makes it where it applies.
    """

    title: str
    file: str
    meaning: str
    make: Callable[[Path, Album], list[Block]]
    command: Callable[[Record], str] | None = None


SOURCES = (
    Source(
        'Recipe',
        f'packed/{MANIFEST}',
        'What was asked for, with all defaults and overrides, as the packed checkpoint states it.',
        methods.recipe,
    ),
    Source(
        'Masks',
        f'masks/{INDEX}',
        'Ground truth, FP32 and quantized masks of evaluated images; first those whose quantized masks agree least '
        'with FP (mean IoU over the objects). Where a mask is empty, its prompt box is drawn.',
        methods.masks,
        masks_command,
    ),
    Source(
        'Quantization error',
        'summary.csv',
        'SQNR (signal over quantization noise, dB, higher is better) of each quantizer alone, on its own input.',
        methods.quantizers,
    ),
    Source(
        'Reconstruction',
        'reconstruction.csv',
        'Each unit learns the rounding of its weights and its activation scales against the float output. A bar is '
        'the loss that is left over that of nearest rounding: below 1 is a gain. The highest, which gained least, are '
        'numbered.',
        methods.reconstruction,
    ),
    Source(
        'Bimodal integration (BIG)',
        'big.json',
        'Keys of token-to-image attention whose distribution has two peaks get the signs of their channels flipped, '
        'which q absorbs: one peak is left. Measured in the float model.',
        methods.bimodality,
    ),
    Source(
        'Condition numbers (ACNR)',
        'condition_number.csv',
        'Weights with a high condition number amplify the error of their inputs; ACNR replaces them. SQNR against the '
        "float output counts the change of the weight as error, SQNR against the new weight's own output does not.",
        methods.conditions,
    ),
    Source(
        'Perceptual clipping (PCC)',
        'clipping.csv',
        'Ranges of q and k are clipped where that keeps the focus of attention. Measured on calibration images.',
        methods.clipping,
    ),
    Source(
        'Channel groups (CAG)',
        'analysis/channel_groups.json',
        'Lines: extremes of each channel. Bands: the range that its group shares. Dashed: the one range that all '
        'channels would share without groups. The more of a band is filled, the better its levels are used.',
        analysis.groups,
    ),
    Source(
        'Sensitivity',
        'analysis/sensitivity.csv',
        'One quantizer on, all others float: SQNR of the mask logits and IoU of the masks against the float model, '
        'on calibration images. The reverse, all on but one, stands in the table.',
        analysis.sensitivity,
        analysis_command,
    ),
    Source(
        'Statistics of activations and weights',
        'analysis/statistics.csv',
        'What makes a tensor hard to quantize: two peaks (bimodality), heavy tails (kurtosis, outliers), channels of '
        'different ranges (spread: 1 is none), badly conditioned weights. Of the float model, on calibration images.',
        analysis.statistics,
    ),
    Source(
        'Activations and quantizer levels',
        'analysis/histograms.json',
        'Counts on a logarithmic axis; vertical lines are the levels of the quantizer. One point of each role.',
        analysis.histograms,
    ),
)


def run_sections(record: Record, album: Album, anchor: str) -> list[Section]:
    """What there is to say about a run.

    Args:
        record: the run.
        album: takes the pictures.
        anchor: beginning of the sections' anchors.
    """
    sections = [facts(record)] if record.result else []
    sections += [section for source in SOURCES if (section := read_section(record, source, album)) is not None]
    for number, section in enumerate(sections):
        section.anchor = f'{anchor}-{number}'
    return sections


def read_section(record: Record, source: Source, album: Album) -> Section | None:
    """The section of a file; None if the file is not there and no command makes it."""
    path, section = record.folder / source.file, Section(source.title, source.meaning)
    if not path.is_file():
        if source.command is None or record.result is None:
            return None
        section.blocks.append(Line(f'This run has no {source.file} yet. It is made by', source.command(record)))
        return section
    try:
        section.blocks += source.make(path, album)
    except AssetError as error:
        section.blocks.append(Line(f'{error}; run again to have it.'))
    except (OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        section.blocks.append(Line(f'{source.file} is not what a run writes ({type(error).__name__}: {error}).'))
    return section if section.blocks else None


def facts(record: Record) -> Section:
    """Metrics, size, time and memory of a run that is done."""
    result: dict[str, Any] = record.result or {}
    whole, quantized = result['metrics']['fp'] or {}, result['metrics']['quant'] or {}
    sizes, seconds = result.get('size_mb') or {}, result.get('seconds') or {}
    pairs = {**{name: (whole.get(name), value) for name, value in quantized.items()}}
    pairs['size in MB (10⁶ bytes)'] = sizes.get('fp'), sizes.get('packed')
    rows: list[tuple[Value, ...]] = [
        (name, fp, value, None if fp is None or value is None else value - fp) for name, (fp, value) in pairs.items()
    ]
    section = Section(
        'Metrics',
        f'{result.get("images", "?")} images, seed {record.seed}, {result.get("processes", 1)} process(es), peak '
        f'memory {(result.get("peak_memory_mb") or 0) / 1000:.1f} GB. Metrics are fractions here, not percent.',
    )
    section.blocks.append(Table('Float against quantized', ('metric', 'FP', 'quantized', 'difference'), tuple(rows)))
    if result['compat']:
        section.blocks.append(
            Line(f'With published defects ({", ".join(result["compat"])}): this is no honest quantization.')
        )
    if seconds:
        section.blocks.append(stages('time of each stage in seconds', [('all stages', seconds)]))
    section.blocks.append(
        Line('Its command, apart from options that are not kept with the result:', run_command(record))
    )
    return section
