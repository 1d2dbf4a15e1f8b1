"""Timed stages, shown as they end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)

SECONDS_BETWEEN_NOTES = 5.0
Item = TypeVar("Item")


@dataclass
class Stages:
    """Times the stages of a run and shows them as they end."""

    seconds: dict[str, float] = field(default_factory=dict)
    quiet: bool = False  # shows nothing: for stages within the steps of another

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block under ``name``."""
        start = time.perf_counter()
        with console.status(f"{name} ...") if console.is_terminal and not self.quiet else nullcontext():
            yield
        self._end(name, start)

    @contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[..., None]]:
        """Times the block under ``name``, and shows how many steps are done; yields the function that counts one step."""
        with self.chunks(name, total, unit="") as advance:
            yield lambda *_: advance(1)

    def each(self, name: str, items: Collection[Item]) -> Iterator[Item]:
        """Yields the items, times the loop over them under ``name``, and shows how many are done."""
        with self.steps(name, len(items)) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def chunks(self, name: str, total: int, done: int = 0, unit: str = " stars") -> Iterator[Callable[[int], None]]:
        """Times the block, and shows how many stars are done and how much time is left; yields the function that counts stars.

        A terminal shows one bar. Elsewhere a line is printed every few seconds.
        """
        start, before, last = time.perf_counter(), done, 0.0
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, console=console, transient=True, disable=self.quiet or not console.is_terminal) as progress:
            task = progress.add_task(name, total=total, completed=done)

            def advance(count: int) -> None:
                nonlocal done, last
                done += count
                progress.update(task, completed=done)
                seconds = time.perf_counter() - start
                if not console.is_terminal and seconds - last > SECONDS_BETWEEN_NOTES and done < total:
                    last = seconds
                    left = (total - done) * seconds / (done - before)
                    self.note(f"  {name}: {done:,} of {total:,}{unit}, {left:,.0f} s left")

            yield advance
        self._end(name, start)

    def note(self, text: str) -> None:
        """Shows a line between the stages."""
        if not self.quiet:
            console.print(text)

    def _end(self, name: str, start: float) -> None:
        seconds = time.perf_counter() - start
        self.seconds[name] = round(self.seconds.get(name, 0.0) + seconds, 3)
        self.note(f"{name:<40} {seconds:7.1f} s")
