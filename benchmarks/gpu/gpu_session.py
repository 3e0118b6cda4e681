"""Run every benchmark that a GPU must answer, the most telling first, within ten minutes.

    PYTHONPATH=. python benchmarks/gpu/gpu_session.py --out DIR [--original DIR] [--commit TEXT]
    PYTHONPATH=. python benchmarks/gpu/gpu_session.py --out DIR --parts NAME ...   # some parts
    PYTHONPATH=. python benchmarks/gpu/gpu_session.py --out DIR --device cpu --tiny  # does it run?

Each part is a process with its own time limit. It prints each row at once and rewrites its JSON
with each row. The session packs all JSONs and logs into one archive, DIR/gpu_session.zip, whenever
one of them changes. It replaces the archive by renaming, so that you can stop at any moment and
keep what is there. A further session with the same DIR adds to the archive; what a part had found
before becomes earlier_NAME.json.

A part that fails, hangs or overruns its limit is killed with its children and loses nothing but the
row it was at. The exit status is then 1. The first five parts need torch, numpy, einops,
safetensors and scipy alone, and no installation. The last part needs your checkout of the original
(see `vs_original.py`); without one the session skips the part and says so.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ARCHIVE = "gpu_session.zip"
SUMMARY = "session.json"
LEAST_S = 10.0  # the session does not start a part with less time left
POLL_S = 0.25
KILL_S = 5.0  # a process stuck in the driver may outlive its SIGKILL
TINY_FACTOR = 10  # on the time limits: slower machines try the script
MARK = "TUMORSYNTH_GPU_SESSION_PART"  # in the environment of a part and of all its children
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Arguments = argparse.Namespace


@dataclass(frozen=True)
class Part:
    name: str
    limit_s: float
    script: str
    options: Callable[[Arguments], list[str]] = lambda _: []
    missing: Callable[[Arguments], str | None] = lambda _: None  # why the part cannot run here


def ways(*which: str) -> Callable[[Arguments], list[str]]:
    def options(args: Arguments) -> list[str]:
        generators = ["tiny"] if args.tiny else ["liver-early", "published"]
        return ["--generator", *generators, "--ways", *which, "--batches", "1", "8"]

    return options


def tiny(args: Arguments) -> list[str]:
    return ["--tiny"] if args.tiny else []


def training(args: Arguments) -> list[str]:
    return ["--seconds", "0.5" if args.tiny else "3", *tiny(args)]


def original(args: Arguments) -> list[str]:
    return ["--original", str(args.original), "--eager"]


def original_missing(args: Arguments) -> str | None:
    if args.original is None:
        return "pass --original CHECKOUT to compare with the original"
    needed = ("einops_exts", "rotary_embedding_torch")  # vs_original.NEEDED
    absent = [name for name in needed if find_spec(name) is None]
    return f"the original needs {', '.join(absent)}; pip install them" if absent else None


PARTS = [
    Part("checks", 40, "gpu_checks.py", lambda _: ["--compiled", "without"]),
    Part("networks", 80, "ways.py", ways("float32", "bfloat16")),
    Part("probe", 30, "gpu_probe.py", tiny),
    Part("search", 25, "search.py"),
    Part("training", 60, "gpu_training.py", training),
    Part("compiled", 160, "ways.py", ways("compiled bfloat16", "compiled float32")),
    Part("original", 40, "../speed/vs_original.py", original, original_missing),
    Part("compiled_check", 60, "gpu_checks.py", lambda _: ["--compiled", "alone"]),
]


class Archive:
    """The zip of all files in ``folder``; `update` replaces it whenever one has changed."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.path, self.folder = path, folder
        if path.exists():
            self._unpack()
        self.packed = self._state()

    def _unpack(self) -> None:
        try:
            with zipfile.ZipFile(self.path) as old:
                for name in old.namelist():
                    (self.folder / Path(name).name).write_bytes(old.read(name))
        except zipfile.BadZipFile:
            raise SystemExit(
                f"{self.path} is not a zip archive; move it away or choose another --out"
            ) from None

    def _files(self) -> list[Path]:
        found = self.folder.iterdir()
        return sorted(p for p in found if p.is_file() and not p.name.startswith("."))

    def _state(self) -> dict[str, tuple[int, int]]:
        stats = {p.name: p.stat() for p in self._files()}
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}

    def update(self) -> None:
        state = self._state()
        if state == self.packed:
            return
        unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as new:
                for path in self._files():
                    new.writestr(path.name, path.read_bytes())
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)
        self.packed = state


class Session:
    """Runs parts and keeps their results in the archive."""

    def __init__(self, args: Arguments, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.archive = Archive(args.out / ARCHIVE, folder)
        summary = folder / SUMMARY
        before = json.loads(summary.read_text())["parts"] if summary.exists() else []
        self.parts: dict[str, dict[str, Any]] = {part["part"]: part for part in before}
        self.machine = describe_machine(args.commit)

    def record(self, name: str, ended: str, seconds: float = 0.0) -> None:
        self.parts[name] = {"part": name, "ended": ended, "s": round(seconds, 1)}
        found = {"machine": self.machine, "parts": list(self.parts.values())}
        unfinished = self.folder / f".{SUMMARY}"
        unfinished.write_text(json.dumps(found, indent=2) + "\n")
        unfinished.replace(self.folder / SUMMARY)
        self.archive.update()

    def run(self, part: Part, limit_s: float) -> str:
        """How the part ended; its output is printed as it comes."""
        print(f"== {part.name}: at most {limit_s:.0f} s", flush=True)
        for earlier in self.folder.glob(f"{part.name}.*"):
            earlier.replace(self.folder / f"earlier_{earlier.name}")
        self.record(part.name, "running")
        log, start, shown, ended = self.folder / f"{part.name}.log", time.monotonic(), 0, "stopped"
        mark = f"{os.getpid()}.{part.name}"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(part),
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(mark),
                cwd=ROOT,
                preexec_fn=_lead_a_group_and_die_with_the_session,
            )
        try:
            while ended == "stopped":
                try:
                    ended = f"exit {process.wait(POLL_S)}"
                except subprocess.TimeoutExpired:
                    if time.monotonic() - start > limit_s:
                        ended = f"killed after its {limit_s:.0f} s"
                shown = print_from(log, shown)
                self.archive.update()
        finally:
            if not kill(process, mark):
                ended += ", and did not die"
            print_from(log, shown)
            seconds = time.monotonic() - start
            self.record(part.name, ended, seconds)
            print(f"== {part.name}: {ended}, {seconds:.1f} s", flush=True)
        return ended

    def _command(self, part: Part) -> list[str]:
        args = self.args
        output = ["-o", str(self.folder / part.name), "--repeats", str(args.repeats)]
        script = [sys.executable, "-u", str(HERE / part.script), "--device", args.device]
        return [*script, *output, *part.options(args)]

    def _environment(self, mark: str) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), MARK: mark}
        if self.args.commit:
            found["BENCHMARK_COMMIT"] = self.args.commit
        return found


_libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before any fork


def _lead_a_group_and_die_with_the_session() -> None:
    os.setpgid(0, 0)
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def kill(process: subprocess.Popen[bytes], mark: str) -> bool:
    """Kill a part with all its children, those in sessions of their own too; whether all died."""
    end = time.monotonic() + KILL_S
    while True:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        alive = marked(mark)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if process.poll() is not None and not alive:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.05)


def marked(mark: str) -> list[int]:
    """Processes with this mark in their environment; none where there is no /proc."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it ended, or is another user's
            pass
    return found


def print_from(log: Path, start: int) -> int:
    """Print what was added to the log; returns where it ends now."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read()
    print(text.decode(errors="replace"), end="", flush=True)
    return start + len(text)


def describe_machine(commit: str | None) -> dict[str, Any]:
    """What can be told without torch; each part writes processor, GPU, versions and commit."""
    found: dict[str, Any] = {"python": platform.python_version(), "commit": commit}
    found["cpus"] = os.cpu_count()
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
        try:
            told = subprocess.run(
                ["nvidia-smi", query, "--format=csv"], capture_output=True, text=True, timeout=10
            )
            found["nvidia_smi"] = told.stdout.splitlines()
        except subprocess.TimeoutExpired:
            found["nvidia_smi"] = "no answer within 10 s"
    return found


def stop(number: int, _: Any) -> None:
    sys.exit(128 + number)  # through the `finally` that kills the part


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_session.zip")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--original", type=Path, metavar="CHECKOUT", help="of DiffTumor's code")
    parser.add_argument("--commit", help="of a copy without git, for the JSONs")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS])
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the script")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.original = args.original and args.original.resolve()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    end, failed = time.monotonic() + 60 * args.minutes, []
    with tempfile.TemporaryDirectory(prefix="gpu_session_") as folder:
        session = Session(args, Path(folder))
        for part in PARTS:
            if args.parts and part.name not in args.parts:
                continue
            reason, left = part.missing(args), end - time.monotonic()
            if reason:
                session.record(part.name, f"skipped: {reason}")
                print(f"== {part.name}: skipped: {reason}", flush=True)
                continue
            if left < LEAST_S:
                ended = "not started: the session's time is over"
                session.record(part.name, ended)
                print(f"== {part.name}: {ended}", flush=True)
            else:
                limit_s = part.limit_s * (TINY_FACTOR if args.tiny else 1)
                ended = session.run(part, min(limit_s, left))
            if ended != "exit 0":
                failed.append(part.name)
    print(f"{args.out / ARCHIVE}: {len(session.parts)} parts")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
