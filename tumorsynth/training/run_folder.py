"""The folder of a training run: its checkpoint, what must not change on resuming, its lock."""

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
FORMAT = 2  # 1 did not know the labels
STAGES = {1: "autoencoder", 2: "denoiser"}
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


class RunFolder:
    """RUN/: checkpoint.pt, log.csv, pictures/, tensorboard/, and in the end what was trained."""

    def __init__(self, path: Path, identity: dict[str, Any], resume: bool):
        """identity: what must not change between a run and its resumption, JSON-able; what is not
        known yet comes by `complete`. Raises ValueError for a folder that does not fit it."""
        self.path = path
        self.identity = json.loads(json.dumps(identity))
        self.checkpoint = path / CHECKPOINT
        if path.exists() and not path.is_dir():
            raise ValueError(f"a training run is saved into a folder, but {path} is a file")
        holds = [n for n in (CHECKPOINT, "card.json") if (path / n).exists()]
        if holds and not resume:
            raise ValueError(
                f"{path} holds {' and '.join(holds)}; add --resume to go on from there, or choose "
                "another folder"
            )
        if holds == ["card.json"]:
            raise ValueError(
                f"{path} holds what a run has made, but no {CHECKPOINT} to go on from; start from "
                f"it with --init {path} and another --out"
            )
        self.load(set(self.identity))

    def complete(self, **identity: Any) -> None:
        """The rest of the identity; ValueError where the checkpoint is of something else."""
        self.identity |= json.loads(json.dumps(identity))
        self.load()

    def load(self, known: set[str] | None = None) -> dict[str, Any] | None:
        """The last checkpoint, or None; only tensors and plain values are read, nothing run.

        known: parts of the identity to compare, by default all."""
        if not self.checkpoint.is_file():
            return None
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            identity, format = json.loads(saved["identity"]), saved["format"]
        except Exception as error:  # torch raises many kinds for a damaged file
            raise ValueError(
                f"{self.checkpoint} is no checkpoint of a training run ({type(error).__name__}); "
                "restore it, or choose another folder"
            ) from error
        if format != FORMAT:
            raise ValueError(f"{self.checkpoint} is of another version of tumorsynth: start anew")
        keys = sorted({*identity, *self.identity} if known is None else known)
        self._compare(int(saved["step"]), {key: identity.get(key) for key in keys})
        return saved

    def _compare(self, step: int, was: dict[str, Any]) -> None:
        """ValueError where these parts of the checkpoint's identity are not this run's."""
        now = {key: self.identity.get(key) for key in was}
        if was.get("stage") != now.get("stage"):
            raise ValueError(
                f"{self.path} holds a run of `tumorsynth train {STAGES.get(was['stage'], '?')}`; "
                "choose another folder"
            )
        differ = []
        others = [key for key in was if was[key] != now[key]]
        for key in others:
            if key == "scans" and was[key] is not None:
                names = [n for n in {**was[key], **now[key]} if was[key].get(n) != now[key].get(n)]
                differ.append(f"other scans: {', '.join(names)}")
            else:
                differ.append(f"{key} {was[key]!r}, now {now[key]!r}")
        if not others:
            return
        words = f"{self.path} was trained with other settings ({'; '.join(differ)[:400]}); "
        if others == ["steps"] and was["steps"] == step:
            way = f"it is finished: train it further with --init {self.path} and another --out"
        else:
            way = "give --resume the same flags and data, or choose another folder"
        raise ValueError(words + way)

    def save(self, step: int, state: dict[str, Any], seconds: float = 0.0) -> None:
        """Write the checkpoint under a temporary name, then put it in the place of the last.

        seconds: trained so far, over all resumptions."""
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
        except (OSError, RuntimeError) as error:  # torch's own for a disk that fills
            kept = "the last checkpoint stays" if self.checkpoint.is_file() else "none exists yet"
            raise Unwritten(
                f"the checkpoint of step {step} cannot be written to {self.path} ({error}); "
                f"{kept}: make room and --resume",
                error,
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


class Unwritten(OSError):
    """A file of a run that could not be written; errno is that of the cause."""

    def __init__(self, words: str, cause: Exception):
        super().__init__(words)
        self.errno = getattr(cause, "errno", None) or errno.ENOSPC


@contextmanager
def written(run: RunFolder) -> Iterator[None]:
    """Errors of the disk while a run's files are written say which run, and what to do."""
    try:
        yield
    except Unwritten:
        raise
    except OSError as error:
        there = run.checkpoint.is_file()
        kept = f"{run.checkpoint} stays" if there else "no checkpoint exists yet"
        raise Unwritten(
            f"the files of the run in {run.path} cannot be written ({error}); {kept}: make room, "
            f"then the same command{' and --resume' if there else ''}",
            error,
        ) from error


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """ValueError while another run trains into this folder; the first of a run's processes asks."""
    from tumorsynth.scans.outputs import folder_lock

    first = all(os.environ.get(name, "0") == "0" for name in RANKS)
    if first:
        path.mkdir(parents=True, exist_ok=True)
    with folder_lock(path) if first else nullcontext():
        yield


def identity_of(config: Any, **more: Any) -> dict[str, Any]:
    """A config and what else a resumed run must share, for `RunFolder`.

    How often to save, draw or log may change; the hardware may too.
    """
    may_change = ("save_every", "picture_every", "log_every", "accumulate")
    return {**{k: v for k, v in asdict(config).items() if k not in may_change}, **more}
