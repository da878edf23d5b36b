"""The dashboard of a sweep on Weights & Biases (`tools/wandb_dashboard.py`): a workspace for its grid.

Made with wandb's own package `wandb-workspaces`, so that it is a definition that the server takes; to make one needs
neither a login nor a network, to upload it does.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptqsam.cli import exit_code_of
from ptqsam.errors import ConfigError
from ptqsam.fileio import write_json
from ptqsam.report.wandb_content import ITERATION, QUANTIZER, STAGE
from ptqsam.report.wandb_report import import_wandb, no_questions
from ptqsam.sweep.records import read_records
from ptqsam.sweep.spec import load_sweep

METRICS = ('segm_mAP', 'mask_mIoU')
PLOTS = ('sqnr', 'reconstruction', 'big', 'condition_number', 'clipping')
# a grid of the papers has 36 cells; wandb's default are the first 10 runs
MAX_RUNS = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Write the definition of a dashboard, and upload it if asked to.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 bad usage or sweep, no package or login, 3 a damaged result.
    """
    args = parse_args(argv)
    return exit_code_of(lambda: run(args), args.verbose, 'free some memory')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog='wandb_dashboard.py',
        description='Write the workspace of a sweep for Weights & Biases, or create it there.',
    )
    parser.add_argument('sweep', type=Path, help='YAML of the sweep (exp/sweeps/...), or its folder')
    parser.add_argument('--project', help='W&B project of the runs, default that of the sweep')
    parser.add_argument('--entity', help='W&B team or user, default WANDB_ENTITY, else that of the login')
    parser.add_argument('--output', type=Path, metavar='FILE', help='definition, default wandb_dashboard_NAME.json')
    parser.add_argument('--create', action='store_true', help='create it on the server as well; needs a login')
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0.

    Raises:
        PTQSAMError: anything that the user can cause or cure.
    """
    name, metrics, project = describe(args.sweep)
    if (project := args.project or project) is None:
        raise ConfigError(f'{args.sweep}: names no W&B project (wandb: ...); name one with --project')
    output = args.output or Path(f'wandb_dashboard_{name}.json')
    workspace = build_workspace(name, project, args.entity or os.environ.get('WANDB_ENTITY', ''), metrics)
    write_json(output, definition(workspace))
    print(f'definition of the dashboard: {output}', file=sys.stderr)
    if args.create:
        print(create(workspace))
    return 0


def describe(sweep: Path) -> tuple[str, tuple[str, ...], str | None]:
    """What a dashboard has to know of a sweep.

    Args:
        sweep: its YAML or its folder.

    Returns:
        Its name, which is the group of its runs; the metrics of its results, the usual ones if there is none yet; its
        wandb project.
    """
    if not sweep.is_dir():
        return sweep.stem, METRICS, load_sweep(sweep).wandb
    results = (record.result for record in read_records(sweep) if record.result)
    known = [name for result in results for name in result['metrics']['quant']]
    metrics = tuple(name for name in METRICS if name in known) or tuple(dict.fromkeys(known))[:2] or METRICS
    return sweep.resolve().name, metrics, load_sweep(sweep / 'sweep.yaml').wandb


def import_workspaces() -> tuple[Any, Any, Any]:
    """Modules of wandb-workspaces: workspaces, panels, expressions.

    Raises:
        ConfigError: not installed.
    """
    import_wandb()
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
        from wandb_workspaces import expr
    except ImportError:
        raise ConfigError(
            "a dashboard needs wandb-workspaces, which is not installed: pip install 'ptqsam[wandb]'"
        ) from None
    return workspaces, panels, expr


def build_workspace(name: str, project: str, entity: str, metrics: Sequence[str]) -> Any:
    """The dashboard of a sweep.

    Args:
        name: of the sweep, the group of its runs.
        project: wandb project.
        entity: team or user, '' for that of the login.
        metrics: names of metrics without `quant/`, the most important one first.

    Returns:
        `wandb_workspaces.workspaces.Workspace`.

    Raises:
        ConfigError: wandb-workspaces is not installed, or cannot express the name.
    """
    workspaces, panels, expr = import_workspaces()
    if not re.fullmatch(r'[\w .+-]+', name):
        raise ConfigError(f"'{name}': a dashboard cannot name this sweep; use letters, digits and - . _ in its name")
    main_metric = f'quant/{metrics[0]}'
    # panels show means over the innermost groups: over seeds
    grouped = [expr.Metric('Group'), expr.Config('series'), expr.Config('wxay')]
    columns = [main_metric, f'drop/{metrics[0]}', f'fp/{metrics[0]}', 'size_mb/packed', 'peak_memory_mb', 'error']
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f'Sweep {name}',
        sections=[
            workspaces.Section(name=title, panels=content, is_open=True)
            for title, content in (
                ('Accuracy', accuracy_panels(panels, metrics)),
                ('Quantization error', error_panels(panels)),
                ('Reconstruction', reconstruction_panels(panels)),
                ('Masks', mask_panels(panels)),
                ('Cost', cost_panels(panels)),
            )
        ],
        settings=workspaces.WorkspaceSettings(max_runs=MAX_RUNS),
        runset_settings=workspaces.RunsetSettings(
            filters=expr.And(expr.Metric('Group') == name),
            groupby=grouped,
            order=[expr.Ordering(expr.Summary(main_metric), ascending=False)],
            pinned_columns=[f'summary:{column}' for column in columns],
        ),
    )


def accuracy_panels(panels: Any, metrics: Sequence[str]) -> list[Any]:
    """Metrics over bits, what quantization cost, metrics over size, all that differs beside the result."""
    over_bits = [
        panels.LinePlot(
            title=f'{metric} over bits of weights',
            x='bits/weight',
            y=[f'quant/{metric}', f'fp/{metric}'],
            title_x='bits',
            groupby=panels.Config('series'),
            groupby_aggfunc='mean',
            groupby_rangefunc='minmax',
            max_runs_to_show=MAX_RUNS,
        )
        for metric in metrics
    ]
    metric = metrics[0]
    drop = panels.BarPlot(title=f'{metric} lost', metrics=[f'drop/{metric}'], max_bars_to_show=MAX_RUNS)
    by_size = panels.ScatterPlot(
        title=f'{metric} over packed size in MB',
        x=panels.SummaryMetric('size_mb/packed'),
        y=panels.SummaryMetric(f'quant/{metric}'),
    )
    differing = [panels.Config(key) for key in ('model', 'algorithm', 'bits.weight', 'bits.act', 'seed')]
    results = [panels.SummaryMetric(key) for key in ('sqnr_db/act.mean', 'size_mb/packed', f'quant/{metric}')]
    paths = panels.ParallelCoordinatesPlot(
        title='From recipe to result',
        columns=[panels.ParallelCoordinatesPlotColumn(metric=key) for key in (*differing, *results)],
    )
    return [*over_bits, drop, by_size, paths]


def error_panels(panels: Any) -> list[Any]:
    """Error of each quantizer over the depth of the model, and its mean."""
    depth = [
        panels.LinePlot(title=f'SQNR of {what}, dB', x=QUANTIZER, y=[f'sqnr_db/{kind}'], title_x='quantizer')
        for kind, what in (('act', 'activations'), ('weight', 'weights'))
    ]
    means = panels.ScatterPlot(
        title='Mean SQNR of activations over that of weights, dB',
        x=panels.SummaryMetric('sqnr_db/weight.mean'),
        y=panels.SummaryMetric('sqnr_db/act.mean'),
    )
    return [*depth, means]


def reconstruction_panels(panels: Any) -> list[Any]:
    """Loss curves of all units over the iterations, by part of the model."""
    return [
        panels.LinePlot(
            title=f'Loss of units of the {part}, 1 is nearest rounding',
            x=ITERATION,
            metric_regex=f'unit_loss/{prefix}.*',
            title_x='iteration',
            max_runs_to_show=MAX_RUNS,
        )
        for part, prefix in (('encoder', 'image_encoder'), ('decoder', 'mask_decoder'))
    ]


def mask_panels(panels: Any) -> list[Any]:
    """The worst masks of each run, and plots of what the parts of a recipe did."""
    masks = panels.MediaBrowser(
        title='Masks, the worst first',
        media_keys=['pictures/ranked'],
        grid_x_axis='step',
        grid_y_axis='run',
    )
    plots = panels.MediaBrowser(title='Plots', media_keys=[f'plots/{name}' for name in PLOTS], gallery_axis='run')
    return [masks, plots]


def cost_panels(panels: Any) -> list[Any]:
    """Memory and time by stage, and sizes."""
    return [
        panels.LinePlot(title='Largest memory use so far, MB', x=STAGE, y=['stage/memory_mb'], title_x='stage'),
        panels.BarPlot(
            title='Seconds', metrics=[f'seconds/{stage}' for stage in ('calibrate', 'reconstruct', 'evaluate')]
        ),
        panels.BarPlot(title='Packed size, MB', metrics=['size_mb/packed']),
    ]


def definition(workspace: Any) -> dict[str, Any]:
    """What `wandb-workspaces` would send to the server for a workspace, as plain dicts."""
    # the package has no public way to this without sending it
    content: dict[str, Any] = workspace._to_model().model_dump(mode='json', by_alias=True, exclude_none=True)
    return content


def create(workspace: Any) -> str:
    """Create a workspace on the server.

    Args:
        workspace: from `build_workspace`.

    Returns:
        Its address.

    Raises:
        ConfigError: not logged in, no network, or the server refuses.
    """
    wandb = import_wandb()
    try:
        with no_questions():
            workspace.entity = workspace.entity or wandb.Api().default_entity
            return str(workspace.save().url)
    except Exception as error:
        # what the server refuses comes as a class that is none of `wandb.errors`
        if not isinstance(error, ValueError) and type(error).__module__.split('.')[0] != 'wandb':
            raise
        reason = ' '.join(str(error).split())
        raise ConfigError(f'the dashboard was written but not created on the server ({reason})') from None
