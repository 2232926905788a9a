"""Where replies appear: in columns that grow together on a wide terminal, else one after the other."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence

Replies = Sequence[Iterator[str]]
_COLUMN = 36  # characters that a column wants at least


def show(names: Sequence[str], replies: Replies, heard: Callable[[int, str], None]) -> None:
    """Show replies as they come.

    Args:
        names: of those who speak.
        replies: of each, the text so far, again and again.
        heard: told what each has said so far, by number: an interrupted reply counts, too.
    """
    columns = shutil.get_terminal_size().columns
    is_wide = sys.stdout.isatty() and len(names) > 1 and columns >= len(names) * _COLUMN
    if is_wide and _has_rich():
        _side_by_side(names, replies, heard)
    else:
        _one_by_one(names, replies, heard)


def _has_rich() -> bool:
    try:
        import rich.live  # noqa: F401  (kd-recipes[chat])
    except ImportError:
        return False
    return True


def _one_by_one(names: Sequence[str], replies: Replies, heard: Callable[[int, str], None]) -> None:
    for index, (name, reply) in enumerate(zip(names, replies, strict=True)):
        print(f"{name}:", flush=True)
        shown = ""
        try:
            for text in reply:
                heard(index, text)
                print(text[len(shown) :], end="", flush=True)
                shown = text
        finally:
            print("\n", flush=True)


def _side_by_side(names: Sequence[str], replies: Replies, heard: Callable[[int, str], None]) -> None:
    """The models take turns, a token each."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    texts = [""] * len(names)

    def table() -> Table:
        grid = Table(expand=True, box=None, padding=(0, 2, 0, 0))
        for name in names:
            grid.add_column(Text(name), ratio=1, overflow="fold")
        grid.add_row(*map(Text, texts))
        return grid

    console = Console()
    waiting = dict(enumerate(replies))
    try:
        # what is taller than the terminal is cut while it grows, and printed whole when it is done
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while waiting:
                for index, reply in [*waiting.items()]:
                    if (text := next(reply, None)) is None:
                        del waiting[index]
                    else:
                        texts[index] = text
                        heard(index, text)
                live.update(table(), refresh=True)
    finally:
        console.print(table())
        console.print()
