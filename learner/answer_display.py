"""Answer display: accuracy and the breakdown by component of a scored answer file."""

from collections import Counter

from rich.console import Console
from rich.table import Table

from learner.answer_file import Verdict

MOST_ERRORS = 3


def show(verdicts: list[Verdict], title: str, console: Console) -> None:
    """Print what was scored."""
    total, right = len(verdicts), sum(verdict.correct for verdict in verdicts)
    table = Table(title=title, title_justify="left")
    table.add_column("component")
    for name in ("mean", "lowest", "highest", "not 0"):
        table.add_column(name, justify="right")
    for name in verdicts[0].rewards:
        values = [verdict.rewards[name] for verdict in verdicts]
        share = f"{sum(value != 0 for value in values)} of {total}"
        table.add_row(name, f"{sum(values) / total:.4f}", f"{min(values):g}", f"{max(values):g}", share)
    console.print(table)
    console.print(f"accuracy {right / total:.4f}: {right} of {total} correct")
    errors = Counter(verdict.error for verdict in verdicts if verdict.error is not None)
    if errors:
        console.print(f"{errors.total()} of {total} rows could not be scored and count as wrong:")
        for error, count in errors.most_common(MOST_ERRORS):
            console.print(f"  {count} x {error}")
