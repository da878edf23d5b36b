"""A page in a real browser, without a window."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# whatever is not for pages: no first-run pages, updates or other traffic of the browser's own
OPTIONS = (
    '--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update '
    '--disable-sync --disable-dev-shm-usage --hide-scrollbars --enable-logging=stderr --window-size=1280,900 --dump-dom'
)
PROBE = """
addEventListener('load', () => {
  const shown = (table) => [...table.tBodies[0].rows].filter((row) => !row.hidden);
  const texts = (table, column) => shown(table).map((row) => row.cells[column].innerText);
  const tables = [...document.querySelectorAll('table.sortable')];
  const runs = tables.find((table) => table.caption.textContent === 'All runs') ?? tables[0];
  const head = [...runs.tHead.rows[0].cells].findIndex((cell) => cell.innerText.includes('mAP'));
  const click = () => runs.tHead.rows[0].cells[Math.max(head, 0)].querySelector('button').click();
  const found = {before: texts(runs, Math.max(head, 0))};
  click();
  found.ascending = texts(runs, Math.max(head, 0));
  click();
  found.descending = texts(runs, Math.max(head, 0));
  const search = runs.parentNode.previousElementSibling;
  if (search?.type === 'search') {
    search.value = 'QDROP';
    search.dispatchEvent(new Event('input'));
    found.filtered = texts(runs, 0);
  }
  for (const details of document.querySelectorAll('details')) details.open = true;
  const images = [...document.images];
  found.images = images.length;
  found.broken = images.filter((image) => !(image.complete && image.naturalWidth > 0)).length;
  found.width = document.documentElement.scrollWidth;
  found.view = document.documentElement.clientWidth;
  found.fetched = performance.getEntriesByType('resource').map((e) => e.name).filter((n) => !n.startsWith('data:'));
  const drawings = [...document.querySelectorAll('figure.chart .scroll svg')];
  found.drawings = drawings.map((drawing) => drawing.getBoundingClientRect().height);
  const result = document.createElement('pre');
  result.id = 'probe';
  result.textContent = JSON.stringify(found);
  document.body.append(result);
});
"""


@dataclass(frozen=True)
class Look:
    """What a browser makes of a page.

    Attributes:
        console: messages and errors, in order.
        found: what the probe has found.
    """

    console: list[str]
    found: dict[str, Any]


def look_at(page: Path, folder: Path) -> Look:
    """Open a page in Chromium, press the heads of its table of runs, and unfold all of it; skips where there is none.

    The page's own policy stays in force, apart from the probe.

    Args:
        page: HTML file.
        folder: for what the browser writes; empty or absent.
    """
    chromium = shutil.which('chromium') or shutil.which('google-chrome') or shutil.which('chromium-browser')
    if chromium is None:
        pytest.skip('no chromium on PATH, which would open the page')
    probed = folder / 'probed.html'
    folder.mkdir(exist_ok=True)
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = page.read_text(encoding='utf-8').replace("script-src 'sha256-", f"script-src 'sha256-{digest}' 'sha256-", 1)
    probed.write_text(text.replace('</body>', f'<script>{PROBE}</script>\n</body>'), encoding='utf-8')
    command = [chromium, *OPTIONS.split(), f'--user-data-dir={folder / "profile"}', probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = re.findall(r'CONSOLE.*?\] (.*)', done.stderr)
    result = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result is not None, f'the probe has not run: {console or done.stderr[-2000:]}'
    return Look(console, json.loads(html.unescape(result[1])))
