'use strict';
// Tables are sorted by the buttons in their heads and, if they are long, filtered; without this script they are plain tables.
const LONG = 12;

function valueOf(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = Number(text);
  return text !== '' && Number.isFinite(number) ? number : text;
}

// Numbers before texts, what is empty last, whichever the direction.
function compare(a, b, direction) {
  if (a === '' || b === '') return (a === '') - (b === '');
  if (typeof a !== typeof b) return typeof a === 'number' ? -1 : 1;
  return direction * (typeof a === 'number' ? a - b : a.localeCompare(b));
}

function sortBy(table, head) {
  const direction = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
  for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
  head.setAttribute('aria-sort', direction === 1 ? 'ascending' : 'descending');
  const column = head.cellIndex;
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
  rows.sort((a, b) => compare(a[0], b[0], direction));
  table.tBodies[0].append(...rows.map((pair) => pair[1]));
}

for (const table of document.querySelectorAll('table.sortable')) {
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement('button');
    button.type = 'button';
    button.append(...head.childNodes);
    button.addEventListener('click', () => sortBy(table, head));
    head.append(button);
  }
  const rows = [...table.tBodies[0].rows];
  if (rows.length < LONG) continue;
  const input = document.createElement('input');
  input.type = 'search';
  input.placeholder = `Filter ${rows.length} rows`;
  input.setAttribute('aria-label', `Filter: ${table.caption.textContent}`);
  input.addEventListener('input', () => {
    const wanted = input.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !wanted.every((word) => row.textContent.toLowerCase().includes(word));
  });
  table.parentNode.before(input);
}

// What is linked to or printed must not stay folded.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target === null) return;
  for (let node = target; node !== null; node = node.parentElement) if (node.tagName === 'DETAILS') node.open = true;
  target.scrollIntoView();
}
addEventListener('hashchange', unfold);
unfold();
