"""Make the embedded default data set ``scenes``: python tools/make_scenes.py [--root DIR] [--seed N] ..."""

import argparse
import os
import sys
from pathlib import Path

from projects.scenes import generate_scenes, read_manifest
from ptqsam.errors import PTQSAMError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description='Compose photographs with exact masks into a COCO-format data set.')
    default = Path(os.environ.get('PTQSAM_DATA') or 'data').expanduser() / 'scenes'
    parser.add_argument('--root', type=Path, default=default, help='folder to make (default: $PTQSAM_DATA/scenes)')
    parser.add_argument('--num-train', type=int, default=32, metavar='N', help='images to calibrate on (default: 32)')
    parser.add_argument('--num-val', type=int, default=24, metavar='N', help='images to evaluate on (default: 24)')
    parser.add_argument('--seed', type=int, default=0, metavar='N', help='same seed, same bits (default: 0)')
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    try:
        root = generate_scenes(args.root, args.num_train, args.num_val, args.seed)
    except PTQSAMError as error:
        print(f'error: {error}', file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f'{args.root}: interrupted, left as it was', file=sys.stderr)
        return 130
    manifest = read_manifest(root) or {}
    print(
        f'{root}: {args.num_train} train images with {manifest["objects"]["train"]} objects, '
        f'{args.num_val} val images with {manifest["objects"]["val"]} objects, content {manifest["content"][:16]}'
    )
    return 0


if __name__ == '__main__':
    sys.exit(main())
