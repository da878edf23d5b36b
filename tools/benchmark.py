"""Measure what fake quantization costs in time and memory. `python tools/benchmark.py --help`."""

import argparse
import json
import sys
from functools import partial

import torch

from projects.instance_segment_anything import ARCHS, SegmentAnything
from ptqsam.benchmark import Setting, benchmark, benchmark_table, profiles
from ptqsam.config import load_quant_config
from ptqsam.errors import PTQSAMError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Fake-quantized (frozen) over float forward of SAM, random weights.')
    parser.add_argument('--sam', default='vit_b', choices=ARCHS, help='default vit_b')
    parser.add_argument('--image-size', type=int, default=1024, help='pixels, default 1024')
    parser.add_argument('--recipe', default='exp/minmax/w8a8.yaml', help='default exp/minmax/w8a8.yaml')
    parser.add_argument('--what', default='encoder', choices=['encoder', 'decoder'], help='default encoder')
    parser.add_argument('--repeat', type=int, default=3, help='timed forwards of each variant, default 3')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads, at most the free cores; default 1')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda'])
    parser.add_argument('--profile', action='store_true', help='show which operators take the time, measure no memory')
    args = parser.parse_args()
    if args.repeat < 1 or args.threads < 1:
        parser.error('--repeat and --threads must be at least 1')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: no GPU found')
    return args


def main() -> int:
    args = parse_args()
    try:
        recipe = load_quant_config(args.recipe)
        build = partial(SegmentAnything, args.sam, args.image_size)
        setting = Setting(build, recipe, args.what, args.device, args.threads)
        if args.profile:
            print(profiles(setting))
            return 0
        result = benchmark(setting, args.repeat)
    except PTQSAMError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        return 130
    print(benchmark_table(result))
    print(json.dumps({**vars(args), **result}))
    return 0


if __name__ == '__main__':
    sys.exit(main())
