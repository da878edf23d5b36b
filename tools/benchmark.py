"""Measure what quantization, reconstruction and detection cost. `python tools/benchmark.py --help`."""

import argparse
import json
import sys
from functools import partial
from typing import Any

import torch

from projects.instance_segment_anything import ARCHS, SegmentAnything
from projects.instance_segment_anything.benchmark import DETECTORS, benchmark_detectors, detectors_table
from ptqsam.benchmark import Setting, benchmark, benchmark_table, profiles
from ptqsam.benchmark_reconstruct import UNITS, benchmark_reconstruct, reconstruct_table
from ptqsam.benchmark_sensitivity import benchmark_sensitivity, sensitivity_table
from ptqsam.config import load_quant_config
from ptqsam.errors import PTQSAMError

RECIPES = {
    'forward': 'exp/minmax/w8a8.yaml',
    'reconstruct': 'exp/qdrop/w4a4.yaml',
    'sensitivity': 'exp/minmax/w4a4.yaml',
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description='forward (default): fake-quantized (frozen) over float forward of SAM. reconstruct: one iteration '
        'of reconstruction over float forward and backward, for single units. sensitivity: analysis of one image over '
        'a forward pass per quantizer. detect: boxes of one image by each '
        'detector at its test resolution. Random weights.'
    )
    parser.add_argument('mode', nargs='?', default='forward', choices=[*RECIPES, 'detect'])
    parser.add_argument('--sam', default='vit_b', choices=ARCHS, help='default vit_b')
    parser.add_argument('--image-size', type=int, default=1024, help='pixels, default 1024')
    parser.add_argument('--recipe', help='default ' + ', '.join(f'{mode}: {path}' for mode, path in RECIPES.items()))
    parser.add_argument('--repeat', type=int, default=3, help='timed passes of each variant, default 3')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads, at most the free cores; default 1')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--what', default='encoder', choices=['encoder', 'decoder'], help='forward: default encoder')
    parser.add_argument('--profile', action='store_true', help='forward: show which operators take the time, no memory')
    parser.add_argument('--tokens', type=int, help='reconstruct: positions per iteration, default all of an image')
    parser.add_argument('--detectors', nargs='+', default=[], choices=DETECTORS, help='detect: default all')
    parser.add_argument('--units', nargs='+', default=[], choices=UNITS, help='reconstruct: default all')
    parser.add_argument('--no-memory', action='store_true', help='reconstruct: measure time only')
    args = parser.parse_args()
    if args.repeat < 1 or args.threads < 1 or (args.tokens is not None and args.tokens < 1):
        parser.error('--repeat, --threads and --tokens must be at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: no GPU found')
    args.recipe = args.recipe or RECIPES.get(args.mode)
    return args


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Print a table, and return what is to be printed as JSON."""
    if args.mode == 'detect':
        detectors = benchmark_detectors(args.detectors, args.repeat, args.threads)
        print(detectors_table(detectors))
        return {'result': detectors}
    build = partial(SegmentAnything, args.sam, args.image_size)
    setting = Setting(build, load_quant_config(args.recipe), args.what, args.device, args.threads)
    if args.mode == 'reconstruct':
        units = benchmark_reconstruct(setting, args.repeat, args.tokens, args.units, not args.no_memory)
        print(reconstruct_table(units))
        return {'result': units}
    if args.mode == 'sensitivity':
        modes = benchmark_sensitivity(setting)
        print(sensitivity_table(modes))
        return {'result': modes}
    if args.profile:
        print(profiles(setting))
        return None
    result = benchmark(setting, args.repeat)
    print(benchmark_table(result))
    return result


def main() -> int:
    args = parse_args()
    try:
        result = measure(args)
    except PTQSAMError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    if result is not None:
        print(json.dumps({**vars(args), **result}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
