"""What `edgeqat compare` shows: finished runs side by side, how their recipes differ, what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgeqat.errors import InputError
from edgeqat.reporting.schema import Report, Row, read_report
from edgeqat.reporting.summary import COLUMNS, table_rows
from edgeqat.reporting.terminal import fits
from edgeqat.reporting.verdict import verdict

__all__ = ["Comparison", "Difference", "compare_runs", "print_comparison"]


SHOWN_KEYS = 3
"""Of a section that another run does not have; of more keys only the number is shown."""


class Section(dict[str, Any]):
    """The keys of a section that another run does not have at all."""


@dataclass(frozen=True)
class Difference:
    """A dotted key that is not the same in all runs; `values` lacks the runs that do not have it."""

    key: str
    values: dict[str, Any]

    def describe(self, runs: Sequence[str]) -> list[str]:
        """Its value in each of the runs, as text."""
        return [_shown(self.values[run]) if run in self.values else "-" for run in runs]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Finished runs side by side.

    Attributes:
        reports: By run directory, in the order given.
        recipe: How the recipes differ.
        warnings: Why figures of these runs cannot be compared, a line each.
    """

    reports: dict[str, Report]
    recipe: list[Difference]
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a run that lacks a key is absent from its values."""
        return {
            "runs": [
                {
                    "run": run,
                    "recipe_sha256": report.recipe_sha256,
                    "gate": report.gate.passed,
                    "verdict": verdict(report),
                    "results": [
                        {**row.model_dump(mode="json"), "gate": row_verdict(report, row)} for row in report.results
                    ],
                }
                for run, report in self.reports.items()
            ],
            "recipe": [{"key": found.key, "values": found.values} for found in self.recipe],
            "warnings": self.warnings,
        }


def compare_runs(folders: Sequence[Path]) -> Comparison:
    """Reads the reports of finished runs and finds how they differ.

    Raises:
        InputError: A directory holds no finished run, a report cannot be read, or a directory is given twice.
    """
    names = [str(folder) for folder in folders]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"found {twice} twice, wanted each run once")
    reports = {name: read_report(folder) for name, folder in zip(names, folders, strict=True)}
    recipe = differences({name: report.recipe for name, report in reports.items()})
    return Comparison(reports, recipe, _warnings(reports, recipe))


def differences(trees: dict[str, dict[str, Any]]) -> list[Difference]:
    """The dotted keys that are not the same in all trees, in the order in which they appear."""
    flat = {name: dict(_leaves("", tree)) for name, tree in trees.items()}
    _fold_absent(flat)
    keys = dict.fromkeys(key for leaves in flat.values() for key in leaves)
    found = [Difference(key, {name: leaves[key] for name, leaves in flat.items() if key in leaves}) for key in keys]
    return [
        d for d in found if len(d.values) < len(flat) or len({json.dumps(value) for value in d.values.values()}) > 1
    ]


def _fold_absent(flat: dict[str, dict[str, Any]]) -> None:
    """Makes one leaf of a section that is null in one tree, less the keys in which the others differ themselves."""
    for section in sorted({key for leaves in flat.values() for key, value in leaves.items() if value is None}):
        inside = {name: [key for key in leaves if key.startswith(f"{section}.")] for name, leaves in flat.items()}
        having = [name for name, keys in inside.items() if keys]
        alike = {key for name in having for key in inside[name] if len({_json(flat[n].get(key)) for n in having}) == 1}
        for name in having:
            whole = {key.removeprefix(f"{section}."): flat[name][key] for key in inside[name]}
            flat[name] = {key: value for key, value in flat[name].items() if key not in alike} | {
                section: Section(whole)
            }


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _leaves(prefix: str, tree: dict[str, Any]) -> list[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists and empty mappings are leaves."""
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found += _leaves(f"{key}.", value) if isinstance(value, dict) and value else [(key, value)]
    return found


def _warnings(reports: dict[str, Report], recipe: Sequence[Difference]) -> list[str]:
    software = [{"edgeqat": r.edgeqat, "versions": r.machine.get("versions")} for r in reports.values()]
    machine = [{"machine": {**r.machine, "versions": None}} for r in reports.values()]
    data = [{"data": r.data} for r in reports.values()]
    # The threads of measure.threads are the machine's.
    measured = [found for found in recipe if found.key.startswith("measure.") and found.key != "measure.threads"]
    metric = [found for found in recipe if found.key == "task.metric"]
    lines = [(found, "latencies cannot be compared") for found in (*_between(reports, machine), *measured)]
    lines += [(found, "metrics cannot be compared") for found in (*_between(reports, data), *metric)]
    lines += [(found, "a difference may be the software's") for found in _between(reports, software)]
    return [f"{found.key} differs ({' | '.join(found.describe(list(reports)))}): {what}" for found, what in lines]


def _between(reports: dict[str, Report], trees: list[dict[str, Any]]) -> list[Difference]:
    return differences(dict(zip(reports, trees, strict=True)))


def _shown(value: Any) -> str:
    if isinstance(value, Section) and len(value) > SHOWN_KEYS:
        return f"set ({len(value)} keys)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def row_verdict(report: Report, row: Row) -> bool | None:
    """Whether every check on a row passed; None where there is none."""
    verdicts = [c.passed for c in report.gate.checks if (c.variant, c.runtime) == (row.variant, row.runtime)]
    return all(verdicts) if verdicts else None


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints the results of each run, how the recipes differ, and the warnings."""
    runs = list(comparison.reports)
    together = _results(comparison, runs)
    if fits(together, console):
        console.print(together)
    else:  # a path a line, instead of a column of them
        for run in runs:
            console.print(Text(run, style="bold"), soft_wrap=True)
            console.print(_results(comparison, [run], named=False))
    if comparison.recipe:
        _print_recipe(comparison, runs, console)
    elif len(runs) > 1:
        console.print("the recipes are the same")
    if len(runs) > 1:
        console.print("runs are timed one after the other; edgeqat bench times their artifacts in turn")
    for line in comparison.warnings:
        console.print(f"warning: {line}", markup=False, soft_wrap=True)


def _results(comparison: Comparison, runs: Sequence[str], named: bool = True) -> Table:
    """The rows of some runs; with their names in a column, or without and as narrow as can be."""
    if named:
        table = Table(header_style="bold", box=box.SIMPLE, padding=(0, 1))
    else:
        table = Table(header_style="bold", box=box.SIMPLE, padding=(0, 1), collapse_padding=True, pad_edge=False)
    names = {report.results[0].metric.name for report in comparison.reports.values()}
    metric = names.pop() if len(names) == 1 else "metric"
    for column in (*(["run"] if named else []), *COLUMNS, "gate"):
        table.add_column(metric if column == "metric" else column, overflow="fold")
    for run in runs:
        report = comparison.reports[run]
        for row, cells in zip(report.results, table_rows(report), strict=True):
            verdict = {True: "pass", False: "FAIL", None: ""}[row_verdict(report, row)]
            shown = (*([run] if named else []), *cells, verdict)
            table.add_row(*(Text(cell) for cell in shown), end_section=row is report.results[-1])
    return table


def _print_recipe(comparison: Comparison, runs: Sequence[str], console: Console) -> None:
    table = Table(header_style="bold", box=box.SIMPLE, padding=(0, 1))
    for column in ("recipe", *runs):
        table.add_column(Text(column), overflow="fold")
    for found in comparison.recipe:
        table.add_row(*(Text(cell) for cell in (found.key, *found.describe(runs))))
    if fits(table, console):
        console.print(table)
        return
    for found in comparison.recipe:
        console.print(Text(found.key, style="bold"), soft_wrap=True)
        for run, value in zip(runs, found.describe(runs), strict=True):
            console.print(Text(f"  {run}: {value}"), soft_wrap=True)
