"""What the demo shows: tables that move on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from ratelimit.demo.team import Process
from ratelimit.demo.verdict import Outcome

Show = Callable[[Sequence[Process], Sequence[Outcome]], None]


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        # Raise the BrokenPipeError again that is being handled; rich would exit with a status of its own.
        raise  # noqa: PLE0704  # called in an except block


class Screen:
    """Stdout; on a terminal each moment is drawn over the one before."""

    def __init__(self) -> None:
        self._console = _Console(markup=False, highlight=False, emoji=False)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line; on a terminal, one that is too long is broken between words."""
        self._console.print(text, style=style, soft_wrap=not self._console.is_terminal)

    @contextmanager
    def progress(self) -> Generator[Show]:
        """Give a function that shows the progress within this block; it may be called often, and ignores most calls."""
        if sys.stdout.isatty() and self._console.is_interactive:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                yield _at_most_every(0.1, lambda *shown: live.update(_tables(*shown), refresh=True))
        else:
            yield _at_most_every(1.0, lambda *shown: self.say(_line(*shown)))

    def result(self, processes: Sequence[Process], outcomes: Sequence[Outcome], kept: bool, sentence: str) -> None:
        """Print the tables of the whole run, and the verdict."""
        self._console.print(_tables(processes, outcomes))
        for process in processes:
            if process.counts.errors:
                self.say(f"The last error of process {process.pid}: {process.counts.last_error}", "yellow")
        self.say(sentence, "bold green" if kept else "bold red")


def _at_most_every(seconds: float, show: Show) -> Show:
    last = time.monotonic()

    def show_now_and_then(processes: Sequence[Process], outcomes: Sequence[Outcome]) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(processes, outcomes)

    return show_now_and_then


def _line(processes: Sequence[Process], outcomes: Sequence[Outcome]) -> str:
    counts = [process.counts for process in processes]
    calls, refused = sum(each.calls for each in counts), sum(each.refused for each in counts)
    admitted = sum(outcome.admitted for outcome in outcomes)
    return f"{outcomes[0].seconds:.0f} s: {calls} calls, {admitted} admitted, {refused} refused"


def _tables(processes: Sequence[Process], outcomes: Sequence[Outcome]) -> Group:
    calls = Table("process", "kind", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("calls", "admitted", "refused", "waited", "errors"):
        calls.add_column(name, justify="right")
    for process in processes:
        counts = process.counts
        waited = "" if counts.waited is None else f"{counts.waited:.1f} s"
        numbers = str(counts.calls), str(sum(counts.admitted.values())), str(counts.refused)
        calls.add_row(str(process.pid), process.kind, *numbers, waited, str(counts.errors))
    buckets = Table("bucket", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("time", "admitted", "at most", "used"):
        buckets.add_column(name, justify="right")
    buckets.add_column()
    for outcome in outcomes:
        colour = "red" if outcome.broken else "green"
        total = max(outcome.bound, 1)
        bar = ProgressBar(total, outcome.admitted, width=24, complete_style=colour, finished_style=colour)
        numbers = str(outcome.admitted), str(outcome.bound), f"{outcome.share:.1%}"
        buckets.add_row(outcome.key, f"{outcome.seconds:.2f} s", *numbers, bar)
    return Group(calls, buckets)
