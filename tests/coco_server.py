"""A server that has a very small COCO in COCO's own layout, for tests of downloads."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from ptqsam import coco_files
from ptqsam.coco_files import ARCHIVES
from ptqsam.sources import Url
from tests.servers import Server, serve

SIZE = (12, 8)  # width, height
NAMES = {
    'val': [f'{number:012}.jpg' for number in (9, 3, 7, 1)],
    'train': [f'{number:012}.jpg' for number in (20, 5, 12, 30, 8, 11)],
}
OTHER_MEMBERS = {
    'annotations/captions_val2017.json': b'{}',
    '../outside.jpg': b'x',
    'val2017/../../000000000099.jpg': b'x',
    '/000000000098.jpg': b'x',
    'val2017/notes.txt': b'x',
    'test2017/000000000097.jpg': b'x',
}


def picture(name: str) -> bytes:
    """JPEG of an image, another one for every name."""
    buffer = io.BytesIO()
    Image.new('RGB', SIZE, (int(Path(name).stem) * 7 % 256, 80, 160)).save(buffer, 'JPEG')
    return buffer.getvalue()


def annotations(split: str) -> bytes:
    """Instances file of a split, one object per image."""
    content = dict(
        licenses=[],
        images=[dict(id=int(Path(name).stem), file_name=name, width=SIZE[0], height=SIZE[1]) for name in NAMES[split]],
        annotations=[
            dict(
                id=number,
                image_id=int(Path(name).stem),
                category_id=1,
                iscrowd=0,
                area=20.0,
                bbox=[2, 2, 5, 4],
                segmentation=[[2, 2, 7, 2, 7, 6, 2, 6]],
            )
            for number, name in enumerate(NAMES[split], 1)
        ],
        categories=[dict(id=1, name='person', supercategory='person')],
    )
    return json.dumps(content).encode()


def archive(members: dict[str, bytes]) -> bytes:
    """A zip of these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as content:
        for name, data in members.items():
            content.writestr(name, data)
    return buffer.getvalue()


def publish(monkeypatch: pytest.MonkeyPatch, server: Server, name: str, content: bytes) -> None:
    """Let the server have an archive, and the table know it."""
    known = ARCHIVES[name]
    split = known.folder.removesuffix('2017')
    path = urlsplit(known.sources[0].url).path
    server.files[path] = content
    here = replace(
        known,
        sources=(Url(server.url + path),),
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        count=2 if name == 'coco_annotations' else len(NAMES[split]),
        unpacked=len(content),
    )
    monkeypatch.setitem(ARCHIVES, name, here)


@contextmanager
def coco_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serve archives and single images; the tables of `ptqsam.coco_files` point there."""
    with serve(monkeypatch, {}) as server:
        monkeypatch.setattr(coco_files, 'SERVERS', (server.url + '/',))
        texts = {f'annotations/instances_{split}2017.json': annotations(split) for split in NAMES}
        publish(monkeypatch, server, 'coco_annotations', archive({**OTHER_MEMBERS, **texts}))
        for split, names in NAMES.items():
            images = {f'{split}2017/{name}': picture(name) for name in names}
            publish(monkeypatch, server, f'coco_{split}', archive({**OTHER_MEMBERS, **images}))
            server.files |= {f'/{path}': content for path, content in images.items()}
        yield server
