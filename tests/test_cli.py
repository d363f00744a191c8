"""The command line: what it prints, and how each command ends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgeqat.recipe import bundled_recipes, load_recipe
from helpers import ENVIRONMENT, MAIN, CommandLine, digests, run_edgeqat, run_python

pytestmark = pytest.mark.usefixtures("few_rounds")

TINY = [
    "--set=data.image_size=8",
    "--set=data.batch_size=16",
    "--set=data.calibration_n=900",  # leaves 178 images to train on
    "--set=train.float_epochs=1",
    "--set=train.qat_epochs=1",
    "--set=gate={max_drop: null, min_size_ratio: null, min_agreement: null}",
]


FACTORY = """
from torch import nn

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x.mean((2, 3))
        return -x.mean((2, 3))

def make(num_classes):
    return Branching()
"""


# Help and misuse.


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['edgeqat', '--help']\n"
        "from edgeqat.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'matplotlib', 'datasets', 'onnx', 'onnxruntime'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    ended = run_python(code)
    assert (ended.code, ended.err) == (0, "")
    assert "heavy: []" in ended.out
    for command in ("run", "recipes", "inspect", "sensitivity", "verify", "bench", "compare", "doctor"):
        assert f"\n  {command} " in ended.out


def test_a_run_says_what_it_does_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['edgeqat', 'run', 'digits-edge', '-o', sys.argv[1]]\n"
        "import edgeqat.reporting.monitor as monitor\n"
        "def stage(self, text):\n"
        "    print(text, sorted({'torch', 'numpy', 'matplotlib', 'datasets'} & set(sys.modules)))\n"
        "    raise SystemExit(0)\n"
        "monitor.ConsoleMonitor.stage = stage\n"
        "from edgeqat.cli import main\nmain()"
    )
    ended = run_python(code, tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"run digits-edge into {tmp_path / 'out'} []\n"


def test_a_bad_recipe_is_refused_without_torch() -> None:
    ended = run_python(f"import sys; sys.modules['torch'] = None; {MAIN}", "run", "digits-edge", "--set=train.sead=1")
    assert "unknown key train.sead; did you mean seed?" in ended.refusal(2)


@pytest.mark.parametrize("name", ["run", "sensitivity"])
def test_quiet_and_verbose_exclude_each_other(command: CommandLine, tmp_path: Path, name: str) -> None:
    assert "both --quiet and --verbose" in command(name, "-q", "-v", "-o", tmp_path / "out").refusal(2)
    assert not (tmp_path / "out").exists()


def test_no_command_shows_the_help() -> None:
    ended = run_edgeqat()
    assert ended.code == 2
    assert ended.err.startswith("Usage: edgeqat [OPTIONS] COMMAND")
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["runn"], "No such command 'runn'. Did you mean 'run'? See edgeqat --help."),
        (["--bogus"], "No such option: --bogus See edgeqat --help."),
        (["run", "--bogus"], "No such option: --bogus"),
        (["run", "a", "b", "c"], "Got unexpected extra argument"),
        (["run", "--set"], "Option '--set' requires an argument."),
        (["verify"], "Missing argument 'folder'. See edgeqat verify --help."),
    ],
    ids=["command", "option", "option of a command", "too many", "no value", "too few"],
)
def test_misuse_is_one_line_and_exit_2(command: CommandLine, args: list[str], words: str) -> None:
    ended = command(*args)
    assert words in ended.refusal(2)
    assert (ended.out, len(ended.err.splitlines())) == ("", 1)


# Listing commands.


def test_recipes(command: CommandLine) -> None:
    ended = command("recipes")
    assert (ended.code, ended.err) == (0, "")
    assert [line.split("  ")[0].strip() for line in ended.out.splitlines()] == list(bundled_recipes())
    assert all(description in ended.out for description in bundled_recipes().values())


def test_a_bundled_recipe_is_printed_as_it_is_written(command: CommandLine, tmp_path: Path) -> None:
    ended = command("recipes", "folder-ptq")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("# ") and "  calibration_n: 128   " in ended.out
    (tmp_path / "mine.yaml").write_text(ended.out)
    recipe = load_recipe("folder-ptq").model_dump(exclude={"data"})
    assert load_recipe(str(tmp_path / "mine.yaml")).model_dump(exclude={"data"}) == recipe
    assert json.loads(command("recipes", "folder-ptq", "--json").out)["train"] is None
    assert "found no bundled recipe 'folder-pt'; did you mean folder-ptq?" in command("recipes", "folder-pt").refusal(
        2
    )


def test_recipes_as_json(command: CommandLine) -> None:
    ended = command("recipes", "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == bundled_recipes()


def test_inspect_prints_every_op_and_trains_nothing(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = command("inspect", "digits-edge")
    assert (ended.code, ended.err) == (0, "")
    for name in ("entry_block.0", "residual_block", "fc", "INT8"):
        assert name in ended.out
    assert "ops in INT8, 0 in float; plan " in ended.out.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_inspect_says_why_a_layer_is_float(command: CommandLine) -> None:
    ended = command("inspect", "digits-edge", "--set", "quantize.overrides=[{module: fc, quantize: false}]", "--json")
    assert ended.code == 0
    ops = {row["op"]: row for row in json.loads(ended.out)["ops"]}
    assert ops["fc"]["runs"] == "float"
    assert ops["fc"]["reason"] == "its QConfig is None"
    assert ops["entry_block.0"]["runs"] == "INT8"


def test_inspect_as_json(command: CommandLine) -> None:
    ended = command("inspect", "cifar10-resnet20", "--json")
    assert (ended.code, ended.err) == (0, "")
    plan = json.loads(ended.out)
    assert list(plan) == ["plan_hash", "targets", "ops", "batch_norm", "folded", "refusals"]
    assert plan["targets"] == ["onnxruntime", "torchscript"]
    assert len(plan["folded"]) == 19
    assert {row["runs"] for row in plan["ops"] if row["kind"] in ("conv", "linear", "add")} == {"INT8"}
    again = json.loads(command("inspect", "cifar10-resnet20", "--json").out)
    assert again == plan


def test_inspect_diff_shows_only_what_differs(command: CommandLine, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text("quantize: {overrides: [{module: fc, quantize: false}]}")
    ended = command("inspect", "digits-edge", "--diff", other)
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[:2] == ["--- this", "+++ other"]
    assert any(line.startswith("-  fc: linear INT8") for line in lines)
    assert any(line.startswith("+  fc: ") and "float" in line for line in lines)
    assert not any("entry_block" in line for line in lines)
    other.write_text("train: {float_epochs: 1}")
    assert command("inspect", "digits-edge", "--diff", other).out == "the plans are the same\n"
    assert json.loads(command("inspect", "digits-edge", "--diff", other, "--json").out) == {"diff": []}


def test_doctor(command: CommandLine) -> None:
    ended = command("doctor")
    assert (ended.code, ended.err) == (0, "")
    heads = [line.split()[0] for line in ended.out.splitlines()]
    runtimes = ["onnxruntime", "torchscript", "executorch", "litert", "openvino", "aoti"]
    assert heads == ["processor", "features", *runtimes, "gpu", "versions"]
    assert re.search(r"\), \d+ cores; torch uses 1 thread$", ended.out.splitlines()[0])


def test_doctor_as_json(command: CommandLine) -> None:
    import onnxruntime

    ended = command("doctor", "--json")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert list(found) == ["cpu", "arch", "features", "threads", "versions", "runtimes", "gpu"]
    assert found["versions"]["onnxruntime"] == onnxruntime.__version__
    runtime = found["runtimes"]["onnxruntime"]
    assert runtime["version"] == onnxruntime.__version__
    vnni = {"avx512_vnni", "avx_vnni"} & set(found["features"])
    without = "onnxruntime/x86-avx2" if "avx2" in found["features"] else None
    assert runtime["arithmetic"] == ("onnxruntime/x86" if vnni else without)


def test_doctor_without_the_runtime() -> None:
    ended = run_python(f"import sys; sys.modules['onnxruntime'] = None; {MAIN}", "doctor")
    assert (ended.code, ended.err) == (0, "")
    assert "onnxruntime not installed: pip install 'edgeqat[onnxruntime]'" in ended.out


# Bad input to `run`: found before the output directory is touched.


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-recipe"], "no bundled recipe of that name"),
        (["--set=export=[tensorrt]"], "found the runtime 'tensorrt', wanted one of onnxruntime"),
        (["--set=data.source=./nowhere"], "is not digits, cifar10, a folder (looked for "),
        (["--set=data.augment=[rotate]"], "data.augment has 'rotate', wanted names among crop, flip"),
        (["--set=data.calibration_n=5000"], "data.calibration_n is 5000"),
        (["--set=data.std=[1, 1, 0]"], "data.std is [1.0, 1.0, 0.0], wanted figures above 0"),
        (["--set=model.weights=none.pt"], "found no weights file"),
        (["--set=model.factory=edgeqat.zoo:edge"], "model.factory: edgeqat.zoo has no callable 'edge'"),
        (["--set=model.args.num_classes=5"], "the loss cross_entropy of one batch of digits fails: IndexError"),
        (["--set=task.metric=f1"], "task.metric: found the metric 'f1', wanted one of top1, top5, mean_iou, mae"),
        (["--set=task.loss=hinge"], "task.loss: found the loss 'hinge', wanted one of cross_entropy, mse"),
        (["--set=gate.runtimes=[openvino]"], "gate.runtimes: found 'openvino', wanted runtimes of export"),
        (["--set=measure.batch=601"], "measure.batch is 601, but there are 600 test samples; lower it"),
        (
            ["--set=quantize.activations.bits=4", "--set=export=[torchscript]", "--set=gate.runtimes=null"],
            "found 4-bit activations, but torchscript takes 8 bits",
        ),
        (
            ["--set=quantize.batch_norm=live", "--set=quantize.weights.per_channel=false"],
            "its batch norm is live, which scales each channel, but its weight has one scale for all",
        ),
        (["--set=quantize.fusions=[[a, b]]"], "found no module 'a' in the model"),
        (
            ["--set=quantize.overrides=[{module: fcc, quantize: false}]"],
            "the rule for module 'fcc' matches nothing; did you mean 'fc'",
        ),
    ],
    ids=lambda value: value[-1].removeprefix("--set=").partition("=")[0] if isinstance(value, list) else "",
)
def test_bad_input_is_refused_before_anything_is_written(
    command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = [] if not args[0].startswith("--") else ["digits-edge"]
    ended = command("run", *recipe, *args, "-o", "out")
    assert words in ended.refusal(2)
    assert ended.out == ""
    assert list(tmp_path.iterdir()) == []


def test_model_that_cannot_be_captured_is_located(tmp_path: Path) -> None:
    file = tmp_path / "branching.py"
    file.write_text(FACTORY)
    ended = run_edgeqat("run", "digits-edge", "--set=model.factory=branching.py:make", cwd=tmp_path)
    line = ended.refusal(2)
    assert "Branching cannot be captured at branching.py:6 (if x.sum() > 0:)" in line
    assert "remove data-dependent control flow" in line
    assert ended.out == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("args", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["notes.txt"], "holds files that are no edgeqat run, such as notes.txt; choose another directory"),
        (["recipe.yaml", "net.py"], "holds files that are no edgeqat run, such as net.py; choose another directory"),
        (
            ["report.json"],
            "holds report.json but no recipe.yaml, without which it is no run to resume or replace; restore "
            "recipe.yaml, delete the directory, or choose another",
        ),
    ],
    ids=["foreign", "a recipe among foreign files", "no recipe"],
)
def test_directory_with_foreign_files_is_never_touched(
    command: CommandLine, tmp_path: Path, args: list[str], files: list[str], words: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("mine")
    before = digests(tmp_path)
    ended = command("run", "digits-edge", "-o", tmp_path, *args)
    assert ended.refusal(2) == f"error: {tmp_path} {words}"
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "state", "ways"),
    [
        (["recipe.yaml", "report.json"], "a finished run", "pass --overwrite to replace it"),
        (["recipe.yaml"], "an unfinished run", "pass --resume to continue it, --overwrite to replace it"),
    ],
    ids=["finished", "unfinished"],
)
def test_directory_that_holds_another_run(
    command: CommandLine, tmp_path: Path, files: list[str], state: str, ways: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("old")
    before = digests(tmp_path)
    found = command("run", "digits-edge", "-o", tmp_path).refusal(2)
    assert found == f"error: {tmp_path} holds {state}; {ways}, or choose another directory"
    assert digests(tmp_path) == before
    # Bad input leaves the old run alone, --overwrite or not.
    bad = command("run", "digits-edge", "-o", tmp_path, "--overwrite", "--set=task.metric=f1")
    assert "task.metric" in bad.refusal(2)
    assert digests(tmp_path) == before


def test_output_that_is_a_file(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for args in ([], ["--overwrite"]):
        found = command("run", "digits-edge", "-o", tmp_path / "out", *args).refusal(2)
        assert found == f"error: {tmp_path / 'out'} is a file, wanted a directory for the run"
    assert (tmp_path / "out").read_text() == "mine"


def test_output_below_a_file(command: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    found = command("run", "digits-edge", *TINY, "-o", tmp_path / "file" / "out").refusal(2)
    assert found == f"error: {tmp_path / 'file'} is a file, wanted a directory for the run"
    assert (tmp_path / "file").read_text() == "mine"


def test_markup_in_names_is_printed_as_it_is(command: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "[/b][red]"
    ended = command("run", "digits-edge", "-o", out, "--set=data.source=./[bold]")
    assert "[bold]' is not digits" in ended.refusal(2)
    assert f"run digits-edge into {out}" in ended.err


# Other ends.


def test_missing_runtime_is_exit_4_before_training(tmp_path: Path) -> None:
    code = f"import sys; sys.modules['onnxruntime'] = None; {MAIN}"
    found = run_python(code, "run", "digits-edge", "-o", tmp_path / "out", *TINY).refusal(4)
    assert found.endswith("install it: pip install 'edgeqat[onnxruntime]'")
    assert not (tmp_path / "out").exists()


def test_missing_runtime_in_verify_is_exit_4(folder: Path) -> None:
    ended = run_python(f"import sys; sys.modules['onnxruntime'] = None; {MAIN}", "verify", folder)
    assert ended.refusal(4).endswith("install it: pip install 'edgeqat[onnxruntime]'")
    assert len(ended.err.splitlines()) == 1


def test_failed_gate_is_exit_3_and_the_report_says_why(command: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = command("run", "digits-edge", *TINY, "--set=gate.min_size_ratio=100", "-o", out)
    assert ended.code == 3
    assert "Traceback" not in ended.err
    assert "FAIL  min_size_ratio " in ended.out
    assert ">= 100  (qat, onnxruntime)" in ended.out
    assert "do not ship  the gate failed" in ended.out
    assert ended.out.splitlines()[-1] == f"report: {out / 'report.html'}"
    gate = json.loads((out / "report.json").read_text())["gate"]
    assert gate["passed"] is False
    (check,) = gate["checks"]
    assert (check["name"], check["limit"], check["passed"]) == ("min_size_ratio", 100, False)
    assert 1 < check["value"] < 4

    # The same directory again: refused without --overwrite, replaced with it; without limits nothing fails.
    assert "holds a finished run" in command("run", "digits-edge", *TINY, "-o", out).refusal(2)
    again = command("run", "digits-edge", *TINY, "--overwrite", "-o", out)
    assert again.code == 0
    assert "no gate: nothing was checked\n      the fastest of 2 files: artifacts/" in again.out
    assert json.loads((out / "report.json").read_text())["gate"] == {"passed": True, "checks": []}


INTERRUPTED = """
import signal, sys
from edgeqat import artifact_stages, cli
from edgeqat.measuring import latency
from edgeqat.reporting.monitor import ConsoleMonitor

latency.MIN_ROUNDS = latency.MAX_ROUNDS = 5  # how often is measured is not what is tested
artifact_stages.peak_memory = lambda artifact, threads: None
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
tell, stage = ConsoleMonitor.stage, sys.argv.pop(1)

def interrupted(monitor, text):
    tell(monitor, text)
    if stage and text.startswith(stage):
        signal.raise_signal(signal.SIGINT)

ConsoleMonitor.stage = interrupted
sys.argv[0] = "edgeqat"
cli.main()
"""
"""A command that gets Ctrl-C when a stage begins; in a process of its own, which may end as it likes."""


@pytest.mark.parametrize(
    ("auto", "stages"),
    [
        ([], ("load", "train the float", "quantize after", "lower", "verify", "measure")),
        (["--auto"], ("quantize after", "measure")),
    ],
)
def test_a_run_goes_on_after_ctrl_c_in_any_stage(tmp_path: Path, auto: list[str], stages: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    arguments = ["run", "digits-edge", *TINY, *auto, "-o", str(out), "--resume"]
    advice = f"interrupted: the run in {out} is incomplete; the same command with --resume continues it"
    for stage in stages:
        ended = run_python(INTERRUPTED, stage, *arguments)
        assert (ended.code, ended.out, ended.err.splitlines()[-1]) == (130, "", advice)
        assert stage in ended.err.splitlines()[-2]
    assert run_python(INTERRUPTED, "", *arguments).code == 0


def test_ctrl_c_in_a_run_that_replaces_another_says_what_to_leave_out(tmp_path: Path) -> None:
    ended = run_python(INTERRUPTED, "train", "run", "digits-edge", *TINY, "--overwrite", "-o", tmp_path / "out")
    assert ended.code == 130
    assert "the same command with --resume in place of --overwrite continues it" in ended.err


@pytest.mark.parametrize("name", ["verify", "bench"])
def test_ctrl_c_in_a_command_that_writes_nothing_says_so(folder: Path, name: str) -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def hook(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('golden.safetensors'):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.addaudithook(hook)\n{MAIN}"
    )
    before = digests(folder)
    ended = run_python(code, name, folder)
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "interrupted: nothing was written; the same command starts again\n"
    assert digests(folder) == before


def test_a_quiet_run_prints_results_alone_and_a_verbose_one_details(command: CommandLine, tmp_path: Path) -> None:
    quiet = command("run", "digits-edge", *TINY, "-q", "-o", tmp_path / "quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert f"report: {tmp_path / 'quiet' / 'report.html'}" in quiet.out
    two = [*TINY, "--set=export=[onnxruntime,torchscript]", "--resume"]
    verbose = command("run", "digits-edge", *two, "-v", "-o", tmp_path / "verbose")
    assert f"there is no run in {tmp_path / 'verbose'} to resume: it begins at the beginning" in verbose.err
    for runtime in ("onnxruntime", "torchscript"):  # of two, each line names its own
        assert f"float, {runtime}: 100.00% of predictions equal to simulation" in verbose.err
    assert "178 train, 119 validation, 900 calibration, 600 test" in verbose.err
    assert "warning: 900 samples calibrate and 178 are left to train on" in verbose.err
    for told in ("learning rate", "samples/s", " kB (", "ms at p50 of 5 calls"):
        assert told in verbose.err
    assert "\x1b" not in verbose.out + verbose.err


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    command: CommandLine, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    arguments = ["run", "digits-edge", *TINY, "--set=train.float_epochs=4", "-o", str(out)]
    # A parent that ignores the signal, as shells do for jobs in the background, hands that on.
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {MAIN}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "epoch 1/" in line:
                break
        process.send_signal(how)
        shown, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130)
    assert shown == ""
    assert "Traceback" not in told
    if how is not signal.SIGKILL:
        advice = f"the run in {out} is incomplete; the same command with --resume continues it"
        assert told.splitlines()[-1] == f"interrupted: {advice}"
    assert (out / "recipe.yaml").exists()
    assert not (out / "report.json").exists()

    before = digests(out)
    refusal = command(*arguments).refusal(2)
    assert "holds an unfinished run; pass --resume to continue it, --overwrite to replace it" in refusal
    assert "wanted one of them" in command(*arguments, "--resume", "--overwrite").refusal(2)
    other = command(*arguments, "--resume", "--set=train.seed=1").refusal(2)
    assert "holds a run of another recipe: train.seed is 0 there, 1 here" in other
    assert digests(out) == before

    ended = command(*arguments, "--resume")
    assert ended.code == 0, ended
    assert "resumed after epoch " in ended.err
    finished = digests(out)
    again = command(*arguments, "--resume")  # a script that always says --resume
    assert again.code == 0
    assert f"the run in {out} is finished" in again.err
    assert (again.out, digests(out)) == (ended.out, finished)
