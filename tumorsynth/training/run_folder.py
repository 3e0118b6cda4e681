"""The folder of a training run: its checkpoint, its identity, its lock."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

CHECKPOINT = "checkpoint.pt"
FORMAT = 2  # of the checkpoint; 1 had no fingerprint of the labels
STAGES = {1: "autoencoder", 2: "denoiser"}
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


class RunFolder:
    """RUN/: checkpoint.pt, log.csv, pictures/, tensorboard/, and in the end the trained network."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool):
        """Open the folder of a run.

        Args:
            path: the folder; it need not exist.
            identity: JSON-able values that must not change between a run and its resumption;
                `complete` adds those that are known later.
            resume: whether to continue a run.

        Raises:
            ValueError: for a folder that holds another run, or a run without ``resume``.
        """
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.checkpoint = path / CHECKPOINT
        if path.exists() and not path.is_dir():
            raise ValueError(f"a training run is saved into a folder, but {path} is a file")
        existing = [n for n in (CHECKPOINT, "card.json") if (path / n).exists()]
        if existing and not resume:
            raise ValueError(
                f"{path} holds {' and '.join(existing)}; add --resume to continue, or choose "
                "another folder"
            )
        if existing == ["card.json"]:
            raise ValueError(
                f"{path} holds a trained network, but no {CHECKPOINT} to go on from; start from it "
                f"with --init {path} and another --out"
            )
        self.load(set(self.identity))

    def complete(self, **identity: Any) -> None:
        """Add the rest of the identity.

        Raises:
            ValueError: if the checkpoint belongs to another run.
        """
        self.identity |= json.loads(json.dumps(identity))
        self.load()

    def load(self, known: set[str] | None = None) -> dict[str, Any] | None:
        """Load the last checkpoint; only tensors and plain values are read, no code is run.

        Args:
            known: parts of the identity to compare, by default all.

        Returns:
            The checkpoint, or None if there is none.

        Raises:
            ValueError: for a damaged file, another version, or another run's checkpoint.
        """
        if not self.checkpoint.is_file():
            return None
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            identity, format = json.loads(saved["identity"]), saved["format"]
        except Exception as error:  # torch raises errors of many types for a damaged file
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of a training run ({type(error).__name__}); "
                "restore it, or choose another folder"
            ) from error
        if format != FORMAT:
            raise ValueError(
                f"{self.checkpoint} is of another version of tumorsynth; start a new run"
            )
        keys = sorted({*identity, *self.identity} if known is None else known)
        self._compare(int(saved["step"]), {key: identity.get(key) for key in keys})
        return saved

    def _compare(self, step: int, saved: dict[str, Any]) -> None:
        """Raise ValueError if parts of the checkpoint's identity differ from this run's."""
        now = {key: self.identity.get(key) for key in saved}
        if saved.get("stage") != now.get("stage"):
            raise ValueError(
                f"{self.path} holds a run of `tumorsynth train {STAGES.get(saved['stage'], '?')}`; "
                "choose another folder"
            )
        changed = [key for key in saved if saved[key] != now[key]]
        if not changed:
            return
        differences = []
        for key in changed:
            before, after = saved[key], now[key]
            if key == "scans" and before is not None:
                names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
                differences.append(f"other scans: {', '.join(names)}")
            else:
                differences.append(f"{key} {before!r}, now {after!r}")
        problem = f"{self.path} was trained with other settings ({'; '.join(differences)[:400]}); "
        if changed == ["steps"] and saved["steps"] == step:
            fix = f"it is finished: train it further with --init {self.path} and another --out"
        else:
            fix = "give --resume the same flags and data, or choose another folder"
        raise ValueError(problem + fix)

    def save(self, step: int, state: dict[str, Any], seconds: float = 0.0) -> None:
        """Write the checkpoint to a temporary name and rename it over the last.

        Args:
            step: number of finished steps.
            state: parts with a state_dict, by name.
            seconds: of training so far, over all resumptions.

        Raises:
            WriteFailed: if the disk is full, for example; the last checkpoint stays.
        """
        parts = {name: part.state_dict() for name, part in state.items()}
        content = {
            "format": FORMAT,
            "step": step,
            "seconds": seconds,
            "identity": json.dumps(self.identity),
            "parts": parts,
        }
        temporary = self.path / f".{CHECKPOINT}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            kept = "the last checkpoint stays" if self.checkpoint.is_file() else "none exists yet"
            raise WriteFailed(
                f"the checkpoint of step {step} cannot be written to {self.path} ({error}); "
                f"{kept}: make room and --resume",
                error,
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


class WriteFailed(OSError):
    """A file of a run could not be written; errno is that of the cause."""

    def __init__(self, message: str, cause: Exception):
        super().__init__(message)
        self.errno = getattr(cause, "errno", None) or errno.ENOSPC


@contextmanager
def explain_write_errors(run: RunFolder) -> Iterator[None]:
    """Re-raise OSError as WriteFailed, which names the run and the remedy."""
    try:
        yield
    except WriteFailed:
        raise
    except OSError as error:
        has_checkpoint = run.checkpoint.is_file()
        kept = f"{run.checkpoint} stays" if has_checkpoint else "no checkpoint exists yet"
        raise WriteFailed(
            f"the files of the run in {run.path} cannot be written ({error}); {kept}: make room, "
            f"then repeat the command{' with --resume' if has_checkpoint else ''}",
            error,
        ) from error


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Lock the folder for this run; the first of its processes holds the lock.

    Raises:
        ValueError: while another run trains into the folder.
    """
    from tumorsynth.scans.outputs import folder_lock

    is_first = all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)
    if is_first:
        path.mkdir(parents=True, exist_ok=True)
    with folder_lock(path) if is_first else nullcontext():
        yield


def identity_of(config: Any, **more: Any) -> dict[str, Any]:
    """Return the identity of a run for `RunFolder`: a config and further values.

    A resumed run may use other hardware, and may save, draw or log at other intervals.
    """
    may_change = ("save_every", "picture_every", "log_every", "accumulate")
    return {**{k: v for k, v in asdict(config).items() if k not in may_change}, **more}
