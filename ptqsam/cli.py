"""The command line of the main job: calibrate, freeze, evaluate, report (`tools/test_quant.py`, `ptqsam-test`)."""

import argparse
import difflib
import json
import logging
import os
import re
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config, DictAction
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.runner import Runner

from ptqsam.allocator import keep_freed_memory
from ptqsam.config import QuantConfig, load_quant_config
from ptqsam.errors import ConfigError, PTQSAMError
from ptqsam.launch import lost_others, report_failure, report_lost, tell_others, together
from ptqsam.reconstruction.cache import is_out_of_memory
from ptqsam.registry import SOLVER_HOOKS, check_part
from ptqsam.report import result_table
from ptqsam.solver.loop import PTQLoop
from ptqsam.solver.options import RunOptions
from ptqsam.solver.outputs import PREPARATION_FILES, RESULT_FILES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the main job.

    Args:
        argv: command line without the program's name, default `sys.argv`.

    Returns:
        Exit code: 0 done, 2 bad usage or config, 3 missing or bad data or checkpoint, 4 freeze gate, 130 interrupted.
    """
    args = parse_args(argv)
    return exit_code_of(
        lambda: run_together(args),
        args.verbose,
        'lower calibration.max_boxes, reconstruction.tokens_per_step or reconstruction.max_boxes with '
        '--quant-options, or model.test_cfg.chunk_size with --cfg-options',
        'interrupted; run again with --resume to go on from the last finished stage',
    )


def exit_code_of(tool: Callable[[], int], verbose: bool, less_memory: str, interrupted: str = 'interrupted') -> int:
    """Run a tool; what a user can cause or cure becomes one line on stderr and an exit code.

    Args:
        tool: returns its exit code.
        verbose: show the traceback of an error.
        less_memory: what to do when memory runs out.
        interrupted: what is said after Ctrl-C.

    Returns:
        The tool's exit code, that of a `PTQSAMError`, 2 out of memory, 130 interrupted.
    """
    end_with_starter()
    # mmengine tells on stdout which environment variables a config uses; that is for nobody
    MMLogger.get_instance('mmengine').setLevel('WARNING')
    keep_freed_memory()
    try:
        return tool()
    except PTQSAMError as error:
        if verbose:
            traceback.print_exc()
        return report_failure(f'error: {one_line(error)}', error.exit_code)
    except KeyboardInterrupt:
        return report_failure(interrupted, 130)
    except Exception as error:
        if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
            line = f'error: out of memory ({str(error).splitlines()[0]}); {less_memory}'
            return report_failure(line, ConfigError.exit_code)
        if lost_others(error):
            return report_lost(error)
        tell_others(f'error: {type(error).__name__}: {" ".join(str(error).split())}')
        raise


def end_with_starter() -> None:
    """Have this process interrupted when the one is gone that `PTQSAM_PARENT` names: a sweep that was killed."""
    starter = os.environ.pop('PTQSAM_PARENT', '')
    if not starter.isdigit():
        return
    # a process that was started in the background ignores Ctrl-C otherwise
    signal.signal(signal.SIGINT, signal.default_int_handler)

    parent = os.getppid()  # the starter itself, or torchrun

    def watch() -> None:
        with suppress(ProcessLookupError):
            while os.getppid() == parent:
                os.kill(int(starter), 0)  # no signal, only the question
                time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def parse_words(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line that may have values of `k=v` which mmengine cannot read."""
    try:
        return parser.parse_args(argv)
    except (RecursionError, AssertionError):
        parser.error('cannot read the brackets of a value in k=v; close them all, and put lists of dicts into a file')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; bad usage exits with 2."""
    parser = argparse.ArgumentParser(prog='ptqsam-test', description='Quantize the SAM of a pipeline and evaluate it.')
    parser.add_argument('model_config', help='pipeline: detector, SAM, data (configs/...)')
    parser.add_argument('quant_config', help='recipe (exp/...)')
    parser.add_argument('--work-dir', type=Path, help='results go here, default work_dirs/MODEL/RECIPE')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='override the pipeline, k=v')
    parser.add_argument('--quant-options', nargs='+', action=DictAction, default={}, help='override the recipe, k=v')
    parser.add_argument('--eval-fp', action='store_true', help='evaluate the floating-point model as well')
    parser.add_argument('--limit', type=int, help='evaluate only the first N images')
    parser.add_argument('--resume', action='store_true', help='go on from what an earlier run left in the work dir')
    parser.add_argument('--seed', type=int, help="seed of calibration images and boxes, default the recipe's")
    parser.add_argument('--dry-run', action='store_true', help='print what would be done, with estimates, and stop')
    parser.add_argument('--load', type=Path, metavar='DIR', help='evaluate this packed checkpoint, do not calibrate')
    parser.add_argument('--show-dir', type=Path, help='draw ground truth, FP and quantized masks (implies --eval-fp)')
    parser.add_argument(
        '--share-work',
        action='store_true',
        help='compute once what runs have in common: it lies in PTQSAM_CACHE (docs/sharing.md)',
    )
    parser.add_argument(
        '--wandb', metavar='PROJECT', help='report to Weights & Biases, offline unless WANDB_MODE is set'
    )
    parser.add_argument(
        '--wandb-options',
        nargs='+',
        type=key_and_text,
        default=[],
        metavar='K=V',
        help='of that run: name=N group=G tags=a,b id=ID (replaces the run with this id) mode=online',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm'],
        default='none',
        help='share the work with the other processes of torchrun (pytorch) or srun (slurm)',
    )
    parser.add_argument('--verbose', action='store_true', help='show the traceback of an error')
    args = parse_words(parser, argv)
    if args.limit is not None and args.limit < 1:
        parser.error('--limit must be at least 1')
    if args.wandb_options and not args.wandb:
        parser.error('--wandb-options needs --wandb PROJECT')
    return args


def key_and_text(word: str) -> tuple[str, str]:
    """Split `key=text`; unlike the options of a recipe, a text is never a number or a list."""
    key, sign, text = word.partition('=')
    if not sign:
        raise argparse.ArgumentTypeError(f"'{word}' is not KEY=VALUE")
    return key, text


def run_together(args: argparse.Namespace) -> int:
    """`run`, with the other processes of `--launcher`."""
    with together(args.launcher):
        return run(args)


def run(args: argparse.Namespace) -> int:
    """Do what the command line asks for.

    Args:
        args: from `parse_args`.

    Returns:
        Exit code 0.

    Raises:
        PTQSAMError: anything that the user can cause or cure.
    """
    expand_folders()
    overrides = dict(args.quant_options)
    if args.seed is not None:
        overrides['calibration.seed'] = args.seed
    recipe = load_quant_config(args.quant_config, overrides)
    config = load_model_config(args.model_config, args.cfg_options)
    if args.dry_run:
        from ptqsam.solver.dry_run import describe_run

        if is_main_process():
            print(describe_run(config, recipe, args.limit))
        return 0
    work_dir = args.work_dir or Path('work_dirs') / Path(args.model_config).stem / recipe_name(args.quant_config)
    cache_dir = cache_folder()
    for folder, option in ((work_dir, '--work-dir'), (args.show_dir, '--show-dir'), (cache_dir, 'PTQSAM_CACHE')):
        if folder is not None:
            check_writable(folder, option)
    runner = build_runner(config, recipe, args, work_dir, cache_dir)
    runner.test()
    if is_main_process():
        show_result(runner.test_loop.result, args.show_dir)
    return 0


def cache_folder() -> Path:
    """Where boxes of detectors and shared work are kept."""
    return Path(os.environ.get('PTQSAM_CACHE') or 'work_dirs/cache')


def expand_folders() -> None:
    """Make folders in the environment what configs need, which take them as they are."""
    for name in ('PTQSAM_DATA', 'PTQSAM_CKPT'):
        # an empty one means the default, and `~` the home folder
        if value := os.environ.pop(name, ''):
            os.environ[name] = str(Path(value).expanduser())


def one_line(error: PTQSAMError) -> str:
    """Message of an error; torch wraps one from a data loader's worker process into a traceback."""
    return unwrap(str(error).strip().split('\n')[-1].split(f'{type(error).__name__}: ')[-1])


def unwrap(message: str) -> str:
    """Message in one line, without the class and file that mmengine's registry puts before it."""
    text = ' '.join(message.split())
    # KeyError puts its message into quotes; quotes inside stay
    if len(text) > 1 and text[0] == text[-1] and text[0] in '"\'' and text[0] not in text[1:-1]:
        text = text[1:-1]
    return re.sub(r'^(class `\w+` in \S+: )+', '', text)


def load_model_config(path: str, overrides: dict[str, Any]) -> Config:
    """Read a model config, `.py` or `.yaml`, and apply `--cfg-options`.

    Args:
        path: config file.
        overrides: dotted keys to values; every key must exist, so that a typo is not ignored.

    Returns:
        The config.

    Raises:
        ConfigError: missing, not readable, lacks a part, or an override names no key.
    """
    if not Path(path).is_file():
        raise ConfigError(f'{path}: no such model config; they lie in configs/<detector>/')
    try:
        # the log has the config three times; formatting it takes longer than to build the model
        config = Config.fromfile(path, format_python_code=False)
    except (OSError, SyntaxError, KeyError, AttributeError, NameError, TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f'{path}: cannot read this config ({" ".join(str(error).split())})') from None
    for key in overrides:
        check_key(config, key)
    config.merge_from_dict(overrides)
    missing = [key for key in ('model', 'test_dataloader', 'test_evaluator', 'calib_dataset') if key not in config]
    if missing:
        raise ConfigError(f"{path}: lacks '{missing[0]}'; see configs/demo/demo.py for a complete pipeline")
    return config


def check_key(config: Any, dotted: str) -> None:
    """Refuse a dotted key that is not in a config.

    Raises:
        ConfigError: with the closest key at that place.
    """
    node = config
    for part in dotted.split('.'):
        if isinstance(node, list | tuple) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
            continue
        known = list(node) if hasattr(node, 'keys') else []
        if part not in known:
            close = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f'known here: {", ".join(map(str, known)) or "nothing"}'
            raise ConfigError(f"--cfg-options: no key '{dotted}' in the model config, '{part}' is unknown ({hint})")
        node = node[part]


def recipe_name(path: str) -> str:
    """Name of a recipe in folder names: exp/mse/w4a4.yaml -> mse_w4a4."""
    return f'{Path(path).resolve().parent.name}_{Path(path).stem}'


def check_writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be written, before any work is done.

    Raises:
        ConfigError: with the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f'{option} {folder}: cannot write there ({error.strerror}); choose another') from None


class QuantRunner(Runner):
    """mmengine's Runner whose console shows progress and results; its long log goes to the log file."""

    def build_logger(self, log_level: int | str = 'INFO', log_file: str | None = None, **kwargs: Any) -> MMLogger:
        """Build the logger; environment and config, logged next, are for the file."""
        logger = super().build_logger(log_level, log_file, **kwargs)
        for handler in logger.handlers:
            if not isinstance(handler, logging.FileHandler):
                handler.setLevel('WARNING')
        return logger


def build_runner(
    config: Config, recipe: QuantConfig, args: argparse.Namespace, work_dir: Path, cache_dir: Path
) -> Runner:
    """One checked Runner config from the model config, the recipe and the command line; built.

    Args:
        config: model config.
        recipe: checked recipe.
        args: command line.
        work_dir: where results go.
        cache_dir: where detector boxes and shared work are kept.

    Returns:
        A runner whose test loop is `PTQLoop`.
    """
    seed = recipe.calibration.seed
    options = RunOptions(
        model=Path(args.model_config).stem,
        quant=recipe_name(args.quant_config),
        seed=seed,
        limit=args.limit,
        eval_fp=args.eval_fp or args.show_dir is not None,
        resume=args.resume,
        load=args.load and str(args.load),
        show_dir=args.show_dir and str(args.show_dir),
        cache_dir=str(cache_dir),
        share_work=args.share_work,
    )
    config.test_cfg = dict(
        type=PTQLoop.__name__, recipe=recipe.plain(), calib_dataset=config.calib_dataset, options=asdict(options)
    )
    if args.wandb:
        report = dict(type='WandbReport', project=args.wandb) | dict(args.wandb_options)
        check_part(SOLVER_HOOKS, **report)
        config.custom_hooks = [*config.get('custom_hooks', []), report | dict(type='ptqsam.WandbReport')]
    # the processes have joined already; mmengine would do it again, on GPUs only, and wrap the model for training
    config.work_dir, config.launcher = str(work_dir), 'none'
    config.randomness = dict(seed=seed)
    # experiment_name keys mmengine's global logger; two runs in one process must not share it
    config.experiment_name = f'{options.model}_{options.quant}_{time.time_ns()}'
    try:
        runner = QuantRunner.from_cfg(config)
        _ = runner.test_loop  # builds datasets, metrics and hooks
    except (KeyError, TypeError) as error:
        raise ConfigError(f'{args.model_config}: cannot be built ({unwrap(str(error))})') from None
    return runner


def show_result(result: dict[str, Any], show_dir: Path | None) -> None:
    """Print the result table, where the artefacts lie, and the JSON object as the last line."""
    names = (*RESULT_FILES, *PREPARATION_FILES, 'packed')
    print(f'\n{result_table(result)}\n')
    print(f'{result["images"]} images; in {result["work_dir"]}:', end=' ')
    print(*(name for name in names if (Path(result['work_dir']) / name).exists()), sep=', ')
    if show_dir is not None:
        print(f'{len(list(show_dir.glob("*.jpg")))} pictures in {show_dir}')
    print(json.dumps(result))
