"""Where a monitor's records go: a file of lines, TensorBoard, the terminal, Weights & Biases.

A sink is anything with `write(record)` and `close()`. A record is a dict of numbers, None, strings, and lists and dicts
of them. A sink writes None for a number that is not finite.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["JSONLines", "LivePanel", "Sink", "TensorBoard", "WandB", "flatten", "read"]

_LAYERS_SHOWN = 12
_BLOCK = 1 << 16


class Sink(Protocol):
    """Takes records, one per own step of a monitor."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take a record."""

    def close(self) -> None:
        """Take no more."""


class JSONLines:
    """A file of records, one JSON object per line, which survives kills and grows over resumed runs.

    A line is appended by one write to the operating system, under a lock (not on Windows), so that processes may share
    the file; the half of a line that a killed process has left is cut off.

    Args:
        path: path of the file; its folder is made.
        before: the step with which a run goes on from a checkpoint, see `cut`. None: every record stays.

    Raises:
        ValueError: the file exists and does not hold records.
        OSError: the file cannot be written; it holds whole records.

    Example:
        >>> path = Path(__import__("tempfile").mkdtemp()) / "monitor.jsonl"
        >>> JSONLines(path).write({"step": 0, "phi": math.nan})
        >>> read(path)
        [{'step': 0, 'phi': None}]
    """

    def __init__(self, path: str | os.PathLike[str], *, before: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as file:
            # Before anything is cut off: it may be somebody's file.
            os.lseek(file, 0, os.SEEK_SET)
            if os.read(file, 1) not in (b"", b"{"):
                raise ValueError(f"{self.path} is not a file of records: give a new one, or delete it")
            _cut_torn_line(file)
        if before is not None:
            self.cut(before)

    def cut(self, before: int) -> None:
        """Cut the file off at the first record of step `before` or a later one, which is about to be written again."""
        with self._locked() as file:
            end = 0
            for line, record in _records(self.path):
                if record.get("step", 0) >= before:
                    os.ftruncate(file, end)
                    break
                end += len(line)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        line = (json.dumps(plain(record), allow_nan=False) + "\n").encode()
        with self._locked() as file:
            _cut_torn_line(file)
            end = os.lseek(file, 0, os.SEEK_END)
            try:
                while line:
                    line = line[os.write(file, line) :]
            except OSError:
                os.ftruncate(file, end)
                raise

    def close(self) -> None:
        """Nothing is open between writes."""

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        file = os.open(self.path, flags, 0o644)
        try:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a network file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(file)


def _cut_torn_line(file: int) -> None:
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK)
        os.lseek(file, begin, os.SEEK_SET)
        found = os.read(file, end - begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < os.lseek(file, 0, os.SEEK_END):
        os.ftruncate(file, end)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records in a file that `JSONLines` has written, without a torn last line.

    Raises:
        ValueError: a line is not a record; the message has its number.
        OSError: the file cannot be read.
    """
    return [record for _, record in _records(Path(path))]


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line, and what it holds."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a record ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a record")
        yield line, record


def plain(value: Any) -> Any:
    """The value as JSON has it: None for a number that is not finite, lists for tuples."""
    if isinstance(value, Mapping):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by path: "dither/ratio", "dither.layers/fc.weight/ratio".

    [value, low, high] becomes "x", "x/low" and "x/high". Histograms, samples, the step and None are left out.

    Example:
        >>> flatten({"step": 3, "lr": [0.1], "phi": {"margin": [1.0, None, 2.0], "layers": {"w": {"snr": 0.5}}}})
        {'lr': 0.1, 'phi/margin': 1.0, 'phi/margin/high': 2.0, 'phi.layers/w/snr': 0.5}
    """
    numbers: dict[str, float] = {}

    def take(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, x in value.items():
                take(f"{path}.layers" if name == "layers" else f"{path}/{name}".lstrip("/"), x)
        elif isinstance(value, list | tuple):
            if value and all(isinstance(x, Mapping) for x in value):
                for i, x in enumerate(value):
                    take(f"{path}/{i}", x)
            elif len(value) == 3:
                for suffix, x in zip(("", "/low", "/high"), value, strict=True):
                    take(path + suffix, x)
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            numbers[path] = float(value)

    for name, value in record.items():
        if name == "lr":
            rates = value if isinstance(value, list | tuple) else [value]
            for i, rate in enumerate(rates):
                take("lr" if len(rates) == 1 else f"lr/{i}", rate)
        elif name not in ("step", "samples"):
            take(name, value)
    return numbers


class TensorBoard:
    """Scalars for TensorBoard, and alarms and advice as text when they change.

    A run that goes on from an earlier checkpoint hides the records that it writes again.

    Args:
        folder: of the event files; TensorBoard is given this or one above.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("TensorBoard: tensorboard is not installed: pip install tensorboard") from error
        self.folder = Path(folder)
        # Made with the first record: its step says from where on the records of an earlier run are hidden.
        self._make: Callable[[int], Any] = lambda step: SummaryWriter(str(self.folder), purge_step=step)
        self._writer: Any = None
        self._said: dict[str, Any] = {}

    def write(self, record: Mapping[str, Any]) -> None:
        """Write a record, down to the disk."""
        step = int(record["step"])
        if self._writer is None:
            self._writer = self._make(step)
        for name, value in flatten(record).items():
            self._writer.add_scalar(name, value, step)
        for name in ("alarms", "advice"):
            sentences = list(record.get(name, ()))
            if sentences != self._said.get(name, []):
                self._said[name] = sentences
                self._writer.add_text(name, "\n\n".join(sentences) or "none", step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB:
    """Numbers for Weights & Biases, under "signstep/", with the optimizer's step as their axis.

    Args:
        run: of wandb; None: the one that wandb.init() has begun. It is not finished here.

    Raises:
        ImportError: the package wandb is not installed.
        RuntimeError: there is no run.
    """

    def __init__(self, run: Any = None) -> None:
        if run is None:
            try:
                wandb = importlib.import_module("wandb")
            except ImportError as error:
                raise ImportError("WandB: wandb is not installed: pip install wandb") from error
            run = wandb.run
            if run is None:
                raise RuntimeError("WandB: there is no run: call wandb.init() first, or pass a run")
        self.run = run
        run.define_metric("signstep/step")
        run.define_metric("signstep/*", step_metric="signstep/step")

    def write(self, record: Mapping[str, Any]) -> None:
        """Log a record."""
        values: dict[str, Any] = {f"signstep/{name}": value for name, value in flatten(record).items()}
        for name in ("alarms", "advice"):
            if record.get(name):
                values[f"signstep/{name}"] = "\n".join(record[name])
        # Not wandb's own step, which belongs to the loop.
        self.run.log({"signstep/step": int(record["step"]), **values})

    def close(self) -> None:
        """Leave the run to the loop."""


_COLUMNS: Sequence[tuple[str, str, str, str]] = (
    ("S", "reliability", "snr", "{:.2g}"),
    ("1-2p", "reliability", "reliability", "{:.2g}"),
    ("of Phi/3", "reliability", "ratio", "{:.3g}"),
    ("zeros", "reliability", "zeros", "{:.0%}"),
    ("rms(m)", "dither", "rms", "{:.2g}"),
    ("rms(m)/sigma", "dither", "ratio", "{:.2g}"),
    ("linear", "dither", "linear_share", "{:.0%}"),
    ("weights", "dither", "weight_rms", "{:.2g}"),
    ("cos", "calibration", "cosine", "{:.2f}"),
)
"""Heading, part of the record, key in it, and format."""


class LivePanel:
    """The last record on the terminal, in place; where there is no terminal, a line per record.

    Args:
        console: of rich; None: the standard output.

    Raises:
        ImportError: the package rich is not installed.
    """

    def __init__(self, console: Console | None = None) -> None:
        try:
            from rich.console import Console
            from rich.live import Live
        except ImportError as error:
            raise ImportError("LivePanel: rich is not installed: pip install rich") from error
        self.console = console or Console()
        self._live: Any = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        self._said: list[str] = []
        if self._live is not None:
            # A training that ends by an error must not leave the terminal without its cursor.
            weakref.finalize(self, self._live.stop)

    def write(self, record: Mapping[str, Any]) -> None:
        """Show a record."""
        if self._live is not None:
            self._live.start()
            self._live.update(_panel(record, self.console.height), refresh=True)
            return
        show = {"highlight": False, "markup": False, "soft_wrap": True}
        self.console.print(_line(record), **show)  # type: ignore[arg-type]
        for said in (*record.get("alarms", ()), *record.get("advice", ())):
            if said not in self._said:
                self.console.print(f"  {said}", **show)  # type: ignore[arg-type]
        self._said = [*record.get("alarms", ()), *record.get("advice", ())]

    def close(self) -> None:
        """Leave the last record where it is."""
        if self._live is not None:
            self._live.stop()


def _value(part: Any, key: str, form: str) -> str:
    """A number of a record, or of [value, low, high] the first; empty where there is none."""
    found = part.get(key) if isinstance(part, Mapping) else None
    if isinstance(found, list | tuple):
        found = found[0] if found else None
    return form.format(found) if isinstance(found, int | float) else ""


def _title(record: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{rate:.3g}" for rate in record.get("lr", ()) if rate is not None)
    parts = [f"step {record['step']}", str(record.get("optimizer", "")), f"lr {rates}" if rates else ""]
    if record.get("micro_batches") is not None:
        parts.append(f"{record['micro_batches']} micro-batches")
    return "  ".join(part for part in parts if part)


def _line(record: Mapping[str, Any]) -> str:
    shown = [(head, _value(record.get(part), key, form)) for head, part, key, form in _COLUMNS]
    return ", ".join([_title(record), *(f"{head} {text}" for head, text in shown if text)])


def _panel(record: Mapping[str, Any], height: int) -> Group:
    from rich.console import Group
    from rich.text import Text

    rest = [Text(_title(record), style="bold")]
    average = (record.get("calibration") or {}).get("average") or {}
    rates = [f"{rule} {_value(average, rule, '{:.3g}')}" for rule in average if average[rule] is not None]
    if rates:
        rest.append(Text("lr for SGD: " + ", ".join(rates)))
    alarms = [Text(said, style="bold red") for said in record.get("alarms", ())]
    advice = [Text(said, style="dim") for said in record.get("advice", ())]
    lines = len(rest) + 2 * (len(alarms) + len(advice)) + 5
    return Group(*rest, _table(record, max(1, min(_LAYERS_SHOWN, height - lines))), *alarms, *advice)


def _table(record: Mapping[str, Any], most: int) -> Table:
    """The layers that come first, and all together."""
    from rich.table import Table
    from rich.text import Text

    parts = {part: record.get(part) or {} for part in ("reliability", "dither", "calibration")}
    names = list(dict.fromkeys(name for part in parts.values() for name in part.get("layers") or {}))
    shown = names if len(names) <= most else names[:most]
    rows = {name: {part: (values.get("layers") or {}).get(name) for part, values in parts.items()} for name in shown}
    rows["all"] = parts
    columns = [c for c in _COLUMNS if any(_value(row[c[1]], c[2], c[3]) for row in rows.values())]
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", no_wrap=True, overflow="ellipsis")
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        if name == "all" and len(shown) < len(names):
            table.add_row(Text(f"... and {len(names) - len(shown)} more", style="dim"))
        style = "bold" if name == "all" else ""
        cells = [_value(row[part], key, form) for _, part, key, form in columns]
        table.add_row(Text(name, style=style), *(Text(cell, style=style) for cell in cells))
    return table
