"""The command line. Heavy imports happen inside the commands, so that --help is quick.

Exit codes: 0 fine; 1 internal error; 2 bad input; 3 the gate or a verification failed; 4 a runtime is not
installed; 5 a process of a training was lost; 130 interrupted (by Ctrl-C or SIGTERM; what a run has done is kept for
--resume).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeqat.endings import end_with_error, end_with_misuse, fail, interrupt, interrupted, show_warning
from edgeqat.errors import EdgeqatError
from edgeqat.launch import is_first, is_launched, launch
from edgeqat.run_folder import FolderState, check_free

if TYPE_CHECKING:
    from edgeqat.reporting.monitor import Monitor
    from edgeqat.reporting.schema import Report

__all__ = ["main"]

app = typer.Typer(
    help="Train, quantize, lower and prove vision models for edge runtimes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

NOTHING_WRITTEN = "nothing was written; the same command starts again"
"""True of every command but run and sensitivity, and of those until they open their directory."""

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""The class of every misuse of the command line; newer typer brings its own click and exports no name for it."""

SetOption = Annotated[list[str], typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one recipe key.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print results and errors alone.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Also tell of single layers and files.")]


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file or the name of a bundled recipe.")] = "digits-edge",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output directory; runs/<recipe> if not given.")
    ] = None,
    settings: SetOption = [],  # noqa: B006  typer copies it
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output directory.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in the output directory where it was stopped.")
    ] = False,
    auto: Annotated[
        bool, typer.Option("--auto", help="Find what passes the gate: PTQ if it does, else another plan, or QAT.")
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """The whole pipeline: train, quantize, lower, verify, measure, decide."""
    from edgeqat.recipe import load_recipe

    folder = Path("runs") / Path(recipe).stem if out is None else out
    loaded, monitor = load_recipe(recipe, settings), _monitor(quiet or not is_first(), verbose)
    if not auto and loaded.compute.devices > 1 and loaded.compute.nodes == 1 and not is_launched():
        monitor.stage(f"start {loaded.compute.devices} processes")
        # Whatever it ends with, a process has told of it.
        sys.exit(launch(sys.argv[1:], loaded.compute.devices, loaded.compute.timeout))
    if resume and check_free(folder, overwrite, resume) is FolderState.FREE:
        monitor.stage(f"there is no run in {folder} to resume: it begins at the beginning")
    monitor.stage(f"run {recipe} into {folder}")
    # torch takes seconds to import; what stands above does without.
    from edgeqat.auto import run_auto
    from edgeqat.pipeline import run as run_recipe

    try:
        report = (run_auto if auto else run_recipe)(loaded, folder, overwrite, monitor, resume)
    except KeyboardInterrupt:
        with_resume = "with --resume in place of --overwrite" if overwrite else "with --resume"
        interrupted(f"the run in {folder} is incomplete; the same command {with_resume} continues it")
    if not is_first():
        return  # with 0: the launcher ends the others where one fails, and the first one may still be telling
    if is_launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the run is done
    _tell(report, folder)
    if not report.gate.passed:
        raise typer.Exit(3)


def _tell(report: Report, folder: Path) -> None:
    from edgeqat.reporting.summary import print_summary
    from edgeqat.reporting.terminal import table_console

    print_summary(report, table_console())
    if report.auto is not None:
        print(f"auto: {report.auto.conclusion}")
        print(f"recipe: {folder / report.auto.recipe}")
    print(f"report: {folder / 'report.html'}")


@app.command()
def recipes(
    name: Annotated[
        str | None, typer.Argument(help="A bundled recipe, to print it; all are listed if not given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Lists the bundled recipes, or prints one."""
    from edgeqat.recipe import bundled_recipes, bundled_text, load_recipe

    if name is not None:
        text = bundled_text(name)
        print(json.dumps(load_recipe(name).model_dump(mode="json"), indent=1) if as_json else text.rstrip())
        return
    found = bundled_recipes()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    width = max(len(name) for name in found)
    for name, description in found.items():
        print(f"{name:<{width}}  {description}")


@app.command()
def inspect(
    recipe: Annotated[str, typer.Argument(help="A YAML file or the name of a bundled recipe.")] = "digits-edge",
    settings: SetOption = [],  # noqa: B006  typer copies it
    diff: Annotated[str | None, typer.Option("--diff", help="Another recipe: show only what differs.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The plan: each op, INT8 or float and why; nothing is trained."""
    from edgeqat.pipeline import plan_recipe
    from edgeqat.recipe import load_recipe
    from edgeqat.reporting.plan_print import print_plan
    from edgeqat.reporting.terminal import table_console

    planned = plan_recipe(load_recipe(recipe, settings))
    if diff is not None:
        difference = planned.diff(plan_recipe(load_recipe(diff, settings)))
        if as_json:
            print(json.dumps({"diff": difference.splitlines()}, indent=1))
        else:
            print(difference or "the plans are the same")
    elif as_json:
        print(json.dumps(planned.to_dict(), indent=1))
    else:
        print_plan(planned, table_console())


@app.command()
def sensitivity(
    recipe: Annotated[str, typer.Argument(help="A YAML file or the name of a bundled recipe.")] = "digits-edge",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Directory of the run; runs/<recipe> if not given.")
    ] = None,
    settings: SetOption = [],  # noqa: B006  typer copies it
    n: Annotated[int, typer.Option("--n", min=2, help="Samples at most, none of them of the test split.")] = 512,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What each layer costs when it is quantized: a ranked table, and a figure beside the run.

    Takes the float weights of the run in the output directory. Where there are none it trains them, and run --resume
    goes on from there.
    """
    from edgeqat.recipe import load_recipe

    folder = Path("runs") / Path(recipe).stem if out is None else out
    loaded, monitor = load_recipe(recipe, settings), _monitor(quiet, verbose)
    monitor.stage(f"sensitivity of {recipe} in {folder}")
    from edgeqat.analysis import analyse

    try:
        table = analyse(loaded, folder, n, monitor)
    except KeyboardInterrupt:
        interrupted(f"float weights trained so far are kept in {folder}; the same command goes on from there")
    if as_json:
        print(json.dumps(table.to_dict(), indent=1))
    else:
        print(table)
        print(f"figure: {folder / 'sensitivity.svg'}")


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="An artifact folder; or a QDQ .onnx file from any tool.")],
    no_hash: Annotated[bool, typer.Option("--no-hash", help="Do not check the files' hashes first.")] = False,
    inputs: Annotated[
        Path | None, typer.Option(help="Inputs for an .onnx file: .npy, or .safetensors with a tensor for each.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Replays the golden vectors shipped inside an artifact folder on this machine's runtime.

    Of an .onnx file in QDQ form: says where ONNX Runtime does not compute what the file means.
    """
    from dataclasses import asdict

    if folder.suffix == ".onnx":
        _verify_file(folder, inputs, as_json)
        return

    from edgeqat.artifact_place import check_artifact_place
    from edgeqat.errors import MissingRuntimeError, TamperedError
    from edgeqat.replay.command import describe
    from edgeqat.replay.folder import FolderError
    from edgeqat.replay.script import replay

    check_artifact_place(folder)
    try:
        result = replay(folder, check=not no_hash)
    except FolderError as error:
        raise TamperedError(str(error)) from error
    except ImportError as error:
        raise MissingRuntimeError("onnxruntime", "onnxruntime", str(error)) from error
    print(json.dumps(asdict(result), indent=1) if as_json else describe(result))
    if not result.passed and result.exact_here:
        raise typer.Exit(3)


def _verify_file(path: Path, inputs: Path | None, as_json: bool) -> None:
    from dataclasses import asdict

    from edgeqat.measuring.qdq_file import read_inputs, verify_qdq

    result = verify_qdq(path, None if inputs is None else read_inputs(inputs))
    print(json.dumps(asdict(result), indent=1) if as_json else result)
    if result.departing:
        raise typer.Exit(3)


@app.command()
def bench(
    folders: Annotated[list[Path], typer.Argument(help="Artifact folders, or run directories.", metavar="DIR...")],
    threads: Annotated[int, typer.Option("--threads", min=1, max=1024, help="Threads within an op.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, max=65536, help="Samples a call.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Latency of artifact folders, interleaved in one run; ratios are against the first."""
    from edgeqat.machine import describe_machine
    from edgeqat.measuring import bench as measuring
    from edgeqat.reporting.latency_table import bench_to_dict, print_bench
    from edgeqat.reporting.terminal import table_console

    results, machine = measuring.bench(folders, threads, batch), describe_machine(threads)
    if as_json:
        print(json.dumps(bench_to_dict(results, machine), indent=1))
    else:
        print_bench(results, machine, table_console())


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Directories of finished runs.", metavar="OUT...")],
    html: Annotated[Path | None, typer.Option("--html", help="Write a page too, with figures.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Finished runs side by side: results, how their recipes differ, and what cannot be compared."""
    from edgeqat.reporting.comparison import compare_runs, print_comparison
    from edgeqat.reporting.terminal import table_console

    comparison = compare_runs(folders)
    if html is not None:
        from edgeqat.files import write_atomically
        from edgeqat.reporting.comparison_page import render_comparison

        write_atomically(html, render_comparison(comparison))
        print(f"page: {html}", file=sys.stderr if as_json else sys.stdout)
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=1))
    else:
        print_comparison(comparison, table_console())


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What this machine can run: processor features, runtimes and their versions, GPU."""
    import torch

    from edgeqat.machine import arithmetic_here, describe_machine, installed_runtimes

    machine = describe_machine(torch.get_num_threads())
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    runtimes = {
        name: {"version": version, "arithmetic": arithmetic_here(name)}
        for name, version in installed_runtimes().items()
    }
    if as_json:
        print(json.dumps({**machine.to_dict(), "runtimes": runtimes, "gpu": gpu}, indent=1))
        return
    threads = f"{machine.threads} thread{'s' if machine.threads > 1 else ''}"
    print(f"processor   {machine.cpu} ({machine.arch}), {os.cpu_count()} cores; torch uses {threads}")
    print(f"features    {' '.join(machine.features) or 'none known'}")
    for name, found in runtimes.items():
        if found["version"] is None:
            print(f"{name:<11} not installed: pip install 'edgeqat[{name}]'")
        else:
            exact = found["arithmetic"] or "no exact arithmetic known for this processor: checked, not proved"
            print(f"{name:<11} {found['version']}, {exact}")
    print(f"gpu         {gpu or 'none'}")
    print("versions    " + ", ".join(f"{name} {version}" for name, version in machine.versions.items()))


def _monitor(quiet: bool, verbose: bool) -> Monitor:
    from edgeqat.reporting.monitor import ConsoleMonitor, Silent

    if quiet and verbose:
        raise typer.BadParameter("found both --quiet and --verbose, wanted one of them.")
    return Silent() if quiet else ConsoleMonitor(verbose)


def main() -> None:
    """Entry point: turns every deliberate error into one line and its exit code."""
    signal.signal(signal.SIGTERM, interrupt)
    warnings.showwarning = show_warning
    try:
        # Outside standalone mode typer.Exit comes back as its code instead of being raised, and so does Ctrl-C.
        code = app(prog_name="edgeqat", standalone_mode=False) or 0
        if code == 130:
            interrupted(NOTHING_WRITTEN)
        sys.exit(code)
    except EdgeqatError as error:
        end_with_error(error)
    except (typer.Abort, KeyboardInterrupt):
        interrupted(NOTHING_WRITTEN)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:  # of a path that was given: where it is ours, it is an OutputError or the like
        place = "" if error.filename is None else f"{error.filename}: "
        fail(f"{place}{error.strerror or error}; check that it exists, and its permissions", 2)
    except UsageError as error:
        end_with_misuse(error)
    finally:
        if is_launched():  # the launcher signals the others when one has ended: they end too, and need no telling
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
