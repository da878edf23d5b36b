"""What a page is made of."""

from dataclasses import dataclass, field

from ptqsam.report.page.charts import Chart
from ptqsam.report.page.svg import short

Value = str | float | None


@dataclass(frozen=True)
class Table:
    """A table; scripts make it sortable.

    Attributes:
        caption: what it shows.
        heads: of the columns.
        rows: texts and numbers; None: not known.
        folded: closed until someone opens it.
    """

    caption: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    folded: bool = False
    kind: str = 'table'

    def text(self, value: Value) -> str:
        """A value as it is shown."""
        return '' if value is None else value if isinstance(value, str) else short(value)

    def is_number(self, value: Value) -> bool:
        """Whether a value is aligned and sorted as a number."""
        return isinstance(value, int | float)


@dataclass(frozen=True)
class Picture:
    """A picture within the page: where its bytes are (a `data:` URI), its size in pixels, what is on it."""

    uri: str
    width: int
    height: int
    caption: str
    kind: str = 'picture'


@dataclass(frozen=True)
class Line:
    """A line of text, and the command or file that it speaks of, if there is one.

    Attributes:
        text: for people.
        code: as it is typed.
        folded: closed until someone opens it.
    """

    text: str
    code: str = ''
    folded: bool = False
    kind: str = 'line'


@dataclass(frozen=True)
class Small:
    """Small charts side by side."""

    charts: tuple[Chart, ...]
    kind: str = 'small'


Block = Chart | Table | Picture | Line | Small


@dataclass
class Section:
    """A part of the page.

    Attributes:
        title: of the section.
        meaning: what the numbers mean.
        blocks: what is in it.
        anchor: where links lead to, unique in the page.
    """

    title: str
    meaning: str
    blocks: list[Block] = field(default_factory=list)
    anchor: str = ''
