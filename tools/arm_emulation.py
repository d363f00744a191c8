"""64-bit ARM without a device: runs Python scripts on aarch64 wheels under QEMU's user-mode emulation.

    sudo apt-get install debootstrap
    sudo python tools/arm_emulation.py install [--mirror URL] [--packages onnxruntime==1.32.0 numpy]
    python tools/arm_emulation.py run [--cpu cortex-a72] script.py [argument ...]

`install` needs Debian or Ubuntu on x86-64, root's rights (debootstrap asks for them), apt and pip, 1 GB and three
minutes. It fills one folder, $EDGEQAT_ARM or ~/.cache/edgeqat-arm:

    root/   Debian 12 for arm64 with Python 3.11: packages unpacked, nothing of them run
    qemu/   qemu-user of Debian 13: version 7.2 of Debian 12 crashes in ONNX Runtime from 1.28 on, and in LiteRT
    site/   the wheels for aarch64, with what they need

`--cpu max` has every instruction that QEMU knows, `cortex-a72` (a Raspberry Pi 4) no dot products: the runtimes choose
other kernels there. Latencies under emulation mean nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(os.environ.get("EDGEQAT_ARM") or Path.home() / ".cache" / "edgeqat-arm")
CPUS = ("max", "cortex-a72")
PACKAGES = ("onnxruntime==1.32.0", "ai-edge-litert==2.3.0", "numpy==2.2.6")

ROOT_SUITE, ROOT_PYTHON = "bookworm", "3.11"
QEMU_SUITE = "trixie"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_26", "2_17")
"""Versions that wheels are built for and that the root's own, 2.36, runs; pip wants each named."""


def is_installed(folder: Path = FOLDER) -> bool:
    """Whether `install` has finished there."""
    return (folder / "site").is_dir()


def command(script: Path, arguments: Sequence[str] = (), cpu: str = "max", folder: Path = FOLDER) -> list[str]:
    """The command line that runs a script under emulation; to be started with `environment(folder)`."""
    root = folder / "root"
    python = str(root / "usr" / "bin" / f"python{ROOT_PYTHON}")
    qemu = str(folder / "qemu" / "usr" / "bin" / "qemu-aarch64")
    return [qemu, "-cpu", cpu, "-L", str(root), python, str(script), *arguments]


def environment(folder: Path = FOLDER) -> dict[str, str]:
    """The environment of emulated processes: only the emulated wheels are on Python's path."""
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}


def versions(folder: Path = FOLDER) -> list[str]:
    """QEMU's and those of the wheels, as "name-version"."""
    qemu = subprocess.run(
        [folder / "qemu" / "usr" / "bin" / "qemu-aarch64", "--version"], capture_output=True, text=True
    )
    wheels = sorted(path.name.removesuffix(".dist-info") for path in (folder / "site").glob("*.dist-info"))
    return [qemu.stdout.splitlines()[0], *wheels]


def install(packages: Sequence[str], mirror: str | None, folder: Path = FOLDER) -> None:
    """Fills `folder`, from the start."""
    source = mirror or _mirror()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    root = folder / "root"
    include = "--include=python3,libgomp1,libstdc++6"
    bootstrap = ["debootstrap", "--arch=arm64", "--foreign", "--variant=minbase", include]
    _run([*bootstrap, f"--keyring={KEYRING}", ROOT_SUITE, str(root), source])
    # The second stage would run ARM programs as root's own; unpacking is all that Python needs.
    _unpack(root / "var" / "cache" / "apt" / "archives", root)
    with tempfile.TemporaryDirectory() as state:
        _run_apt(Path(state), source)
        _unpack(Path(state), folder / "qemu")
    platforms = [f"--platform=manylinux_{version}_aarch64" for version in GLIBC]
    options = ["--only-binary=:all:", "--implementation=cp", f"--python-version={ROOT_PYTHON}", *platforms]
    site = folder / "site.part"
    _run([sys.executable, "-m", "pip", "install", "--quiet", f"--target={site}", *options, *packages])
    site.rename(folder / "site")


def _run_apt(state: Path, mirror: str) -> None:
    """Downloads qemu-user of another suite into a folder, past the system's own lists of packages."""
    (state / "lists" / "partial").mkdir(parents=True)
    (state / "archives" / "partial").mkdir(parents=True)
    (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {mirror} {QEMU_SUITE} main\n")
    places = {"Dir::State::Lists": "lists", "Dir::Cache": ".", "Dir::Etc::SourceList": "sources.list"}
    options = [f"-o{key}={state / name}" for key, name in places.items()]
    options += ["-oDir::Etc::SourceParts=/dev/null", "-oAPT::Sandbox::User=root", "-qq"]
    _run(["apt-get", *options, "update"])
    _run(["apt-get", *options, "download", "qemu-user"], state)


def _mirror() -> str:
    """The first Debian archive among the system's apt sources."""
    wanted = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Created-By: Packages"]
    found = subprocess.run(wanted, capture_output=True, text=True, check=False).stdout.split()
    archives = [uri for uri in found if "security" not in uri]
    if not archives:
        raise SystemExit("error: apt has no Debian archive among its sources; name one with --mirror")
    return archives[0]


def _unpack(archives: Path, where: Path) -> None:
    for package in sorted(archives.glob("*.deb")):
        _run(["dpkg", "-x", str(package), str(where)])


def _run(words: Sequence[str], where: Path | None = None) -> None:
    subprocess.run(words, check=True, cwd=where)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    installing = commands.add_parser("install", help="fill the folder")
    installing.add_argument("--mirror", help="a Debian archive; by default that of the system's apt sources")
    installing.add_argument("--packages", nargs="+", default=PACKAGES, help="what pip installs for aarch64")
    running = commands.add_parser("run", help="run a script")
    running.add_argument("--cpu", default=CPUS[0], help="a processor that `qemu-aarch64 -cpu help` lists")
    running.add_argument("script", type=Path)
    running.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.command == "install":
        install(options.packages, options.mirror)
        return 0
    if not is_installed():
        raise SystemExit(f"error: {FOLDER} holds no emulated root; run `python tools/arm_emulation.py install` first")
    words = command(options.script, options.arguments, options.cpu)
    return subprocess.run(words, env=environment(), check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
