"""Progress of a run on stderr: what it is doing, how far it is, and the time left."""

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

_WARM_UP = 3
"""Number of first updates that are not counted, because they may compile."""
_ENOUGH = 10, 5.0
"""Number of updates, and their seconds, from which the length of a run is estimated."""

_log = logging.getLogger(__name__)


class Phase:
    """A part of a run: its label, `done` of `total`, and a note. Without `total`, only the time that has passed is shown."""

    def __init__(self, progress: "Progress", label: str, total: int | None = None, done: int = 0):
        self._progress = progress
        self.restart(label, total, done)

    def restart(self, label: str, total: int | None = None, done: int = 0) -> None:
        """Begin the next part in the place of this one."""
        self.label, self.total, self.done, self.note = label, total, done, ""
        self._first, self._began = done, time.monotonic()

    def update(self, done: int, note: str | None = None) -> None:
        """Set the count, and the note if one is given."""
        self.done, self.note = done, self.note if note is None else note
        self._progress.report()

    def line(self, width: int | None = None) -> str:
        """Return the phase in one line. Only the note is cut at `width`."""
        elapsed = time.monotonic() - self._began
        if self.total is None:
            head = f"{self.label}  {duration(elapsed)}"
        elif self.done > self._first:
            left = elapsed * max(0, self.total - self.done) / (self.done - self._first)
            head = f"{self.label}  {min(self.done, self.total)}/{self.total}  {duration(left)} left"
        else:
            head = f"{self.label}  {self.done}/{self.total}"
        return f"{head}  {self.note}"[: None if width is None else max(width, len(head))].rstrip()


class Progress:
    """Shows the phases of a run: on a terminal live, otherwise as a line every `every` seconds. With `shown=False`, nothing."""

    def __init__(self, shown: bool, *, console: Console | None = None, every: float = 30.0):
        self._console, self._every, self._shown = console or Console(stderr=True), every, shown
        self._phases: list[Phase] = []
        self._printed = time.monotonic()
        self._live = (
            Live(get_renderable=self._text, console=self._console, transient=True, refresh_per_second=4)
            if shown and self._console.is_terminal
            else None
        )

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def phase(self, label: str, total: int | None = None, done: int = 0) -> Iterator[Phase]:
        """Show a phase, within the present ones, until the block ends."""
        self._phases.append(Phase(self, label, total, done))
        self.report()
        try:
            yield self._phases[-1]
        finally:
            self._phases.pop()

    def report(self) -> None:
        """Print the innermost phase without a terminal, if it is time."""
        if self._shown and self._live is None and time.monotonic() - self._printed >= self._every:
            self._printed = time.monotonic()
            print(" · ".join(phase.line() for phase in self._phases), file=sys.stderr, flush=True)

    def _text(self) -> Text:
        lines = [phase.line(self._console.width - 1) for phase in self._phases]
        return Text("\n".join(lines), no_wrap=True, overflow="crop")


def duration(seconds: float) -> str:
    """Return a time span as `4:05`, `3:04:05` or `2 days 3 h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class LongRunHint:
    """Logs a warning, once, if the run will take more than a day on this machine, judged by the first updates.

    `total`: number of updates of the run. `remedies`: the options that make it faster. Call it after every update.
    """

    def __init__(self, total: int, remedies: Sequence[str]):
        self._total, self._remedies = total, remedies
        self._calls, self._begin, self._judged = 0, (0, 0.0), False

    def __call__(self, done: int, seconds: float) -> None:
        """`done`: number of updates so far; `seconds`: time that they took."""
        self._calls += 1
        if self._calls <= _WARM_UP:
            self._begin = done, seconds
        count, spent = done - self._begin[0], seconds - self._begin[1]
        if self._judged or count < _ENOUGH[0] or spent < _ENOUGH[1]:
            return
        self._judged = True
        days = spent / count * (self._total - done) / 86400
        if days > 1:
            _log.warning(
                "at %.2g updates per second, this run will take about %.1f days on this machine. "
                "Fix: to be faster, stop it with Ctrl-C and start another one, in another --out, with %s",
                count / spent,
                days,
                " or ".join(self._remedies),
            )
