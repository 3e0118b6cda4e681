"""The study's SQLite file: cases with their truth, readers, answers.

Each change is one transaction in WAL mode, on the disk before the page hears that it is saved. The
truth is in this file and nowhere in what the server sends; whoever can open the file can read it,
so it is made for its owner alone.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
ANSWERS = ("real", "synthetic")
CONFIDENCE = range(1, 6)

_TABLES = """
CREATE TABLE study (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE cases (
    id TEXT PRIMARY KEY, truth TEXT NOT NULL CHECK (truth IN ('real', 'synthetic')),
    source TEXT NOT NULL, sha256 TEXT NOT NULL, UNIQUE (truth, source)) STRICT;
CREATE TABLE readers (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE COLLATE NOCASE, seed TEXT NOT NULL,
    started REAL NOT NULL, finished REAL) STRICT;
CREATE TABLE answers (
    reader TEXT NOT NULL REFERENCES readers (id), case_id TEXT NOT NULL REFERENCES cases (id),
    answer TEXT NOT NULL CHECK (answer IN ('real', 'synthetic')),
    confidence INTEGER NOT NULL CHECK (confidence BETWEEN 1 AND 5),
    seconds REAL NOT NULL CHECK (seconds >= 0), changes INTEGER NOT NULL DEFAULT 0,
    answered REAL NOT NULL, PRIMARY KEY (reader, case_id)) STRICT;
"""


class Refused(ValueError):
    """What a reader may not do (any more), or what is no answer."""


@dataclass(frozen=True)
class Reader:
    """id: opaque, what the page says for the name. finished: no answer may change any more."""

    id: str
    name: str
    seed: str
    finished: bool


@dataclass(frozen=True)
class Answer:
    """One reader's answer to one case, beside the truth. seconds: with the case on the screen."""

    reader: str
    case: str
    truth: str
    answer: str
    confidence: int
    seconds: float


class Store:
    """An open study file. ``write=False`` reads it alone, while a server may be writing."""

    def __init__(self, path: Path, *, write: bool = True):
        self.path = Path(path)
        self.lock = threading.Lock()
        if not write and not self.path.is_file():
            raise FileNotFoundError(f"no such file: {self.path}; `reader-study serve` makes it")
        if write and not self.path.parent.is_dir():
            raise FileNotFoundError(f"no such folder for the answers: {self.path.parent}")
        if write:
            self.path.touch(mode=0o600)  # the truth is in it
        uri = f"{self.path.resolve().as_uri()}?mode={'rwc' if write else 'ro'}"
        try:
            self.db = sqlite3.connect(
                uri, uri=True, timeout=10, isolation_level=None, check_same_thread=False
            )
            if write:
                if self.db.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                    self._get("format")  # another program's file is left as it is
                self.db.execute("PRAGMA journal_mode = WAL")
                self.db.execute("PRAGMA synchronous = FULL")
                self.db.execute("PRAGMA foreign_keys = ON")
                with self._change():
                    if self.db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                        for statement in _TABLES.split(";\n"):
                            self.db.execute(statement)
                        self._put("format", str(FORMAT))
                        # the page's address holds it: other accounts and pages cannot guess it
                        self._put("token", secrets.token_urlsafe(16))
            made = self._get("format")
        except sqlite3.DatabaseError as error:
            if "disk" in str(error):  # full, or it fails
                raise OSError(
                    f"the answers cannot be written to {self.path} ({error}); make room, or choose "
                    "another --db"
                ) from error
            raise ValueError(f"{self.path} is not a reader study's file ({error})") from error
        if made != str(FORMAT):
            raise ValueError(f"{self.path} has format {made}, this version reads {FORMAT}")

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def _change(self) -> Iterator[None]:
        with self.lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def _rows(self, sql: str, *values: Any) -> list[tuple]:
        with self.lock:
            return self.db.execute(sql, values).fetchall()

    def _put(self, key: str, value: str) -> None:
        self.db.execute("INSERT INTO study VALUES (?, ?)", (key, value))

    def _get(self, key: str) -> str | None:
        found = self._rows("SELECT value FROM study WHERE key = ?", key)
        return found[0][0] if found else None

    @property
    def token(self) -> str:
        """Of the page's address; the same for the life of the study."""
        return str(self._get("token"))

    def set_up(self, cases: Sequence[tuple[str, str, str]]) -> list[str]:
        """Opaque ids of the cases, given as (truth, source, SHA-256 of the volume as served).

        The first time they are written down; after that they must be the same to the last voxel.
        """
        wanted = {(truth, source): sha for truth, source, sha in cases}
        if len(wanted) != len(cases):
            raise ValueError("each case needs its own file name within its folder; rename some")
        with self._change():
            if self.db.execute("SELECT count(*) FROM cases").fetchone() == (0,):
                rows = [
                    (secrets.token_hex(8), truth, source, sha)
                    for (truth, source), sha in wanted.items()
                ]
                # by id, so that not even the order of the rows tells
                self.db.executemany("INSERT INTO cases VALUES (?, ?, ?, ?)", sorted(rows))
            known = {
                (truth, source): (case, sha)
                for case, truth, source, sha in self.db.execute("SELECT * FROM cases")
            }
        changed = [
            k for k in wanted.keys() | known.keys() if known.get(k, "")[1:] != (wanted.get(k),)
        ]
        if changed:
            raise ValueError(
                f"{self.path} belongs to a study of other cases: {len(changed)} of them are new, "
                "gone or changed; give the same folders and options, or another --db"
            )
        return [known[truth, source][0] for truth, source, _ in cases]

    def reader(self, name: str) -> Reader:
        """The reader of this name, new or known; upper and lower case are the same."""
        name = " ".join(name.split())
        if not 1 <= len(name) <= 80 or not name.isprintable():
            raise Refused("a reader's name must have 1 to 80 letters")
        with self._change():
            self.db.execute(
                "INSERT INTO readers VALUES (?, ?, ?, ?, NULL) ON CONFLICT (name) DO NOTHING",
                (secrets.token_hex(16), name, secrets.token_hex(16), time.time()),
            )
        return self._readers("name = ? COLLATE NOCASE", name)[0]

    def reader_of(self, reader: str) -> Reader:
        """By the opaque id; Refused for an unknown one."""
        found = self._readers("id = ?", reader)
        if not found:
            raise Refused("this reader is unknown; open the page anew")
        return found[0]

    def readers(self) -> list[Reader]:
        return self._readers("1")

    def _readers(self, where: str, *values: Any) -> list[Reader]:
        rows = self._rows(
            f"SELECT id, name, seed, finished FROM readers WHERE {where} ORDER BY started", *values
        )
        return [Reader(key, name, seed, at is not None) for key, name, seed, at in rows]

    def order(self, reader: Reader) -> list[str]:
        """All cases, shuffled by the reader's own seed: the same at each start."""
        cases = [case for (case,) in self._rows("SELECT id FROM cases")]
        return sorted(cases, key=lambda c: hashlib.sha256((reader.seed + c).encode()).digest())

    def answers(self, reader: Reader) -> list[Answer]:
        rows = self._rows(
            "SELECT case_id, truth, answer, confidence, seconds FROM answers "
            "JOIN cases ON cases.id = case_id WHERE reader = ?",
            reader.id,
        )
        return [Answer(reader.name, *row) for row in rows]

    def save(self, reader: Reader, case: str, answer: str, confidence: int, seconds: float) -> None:
        """One answer per reader and case; a later one replaces it and adds its time."""
        if answer not in ANSWERS:
            raise Refused(f"an answer must be {' or '.join(ANSWERS)}, got {answer!r}")
        if type(confidence) is not int or confidence not in CONFIDENCE:
            raise Refused(f"a confidence must be 1 to 5, got {confidence!r}")
        if type(seconds) not in (int, float) or not 0 <= seconds < 1e6:
            raise Refused(f"the time taken must be in seconds, got {seconds!r}")
        with self._change():
            if not self.db.execute("SELECT 1 FROM cases WHERE id = ?", (case,)).fetchone():
                raise Refused("this case is not in the study")
            self._check_open(reader)
            self.db.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?, ?, 0, ?) "
                "ON CONFLICT (reader, case_id) DO UPDATE SET answer = excluded.answer, "
                "confidence = excluded.confidence, seconds = seconds + excluded.seconds, "
                "changes = changes + 1, answered = excluded.answered",
                (reader.id, case, answer, confidence, float(seconds), time.time()),
            )

    def finish(self, reader: Reader) -> None:
        """Close the reader's answers; Refused while some are missing."""
        with self._change():
            self._check_open(reader)
            (left,) = self.db.execute(
                "SELECT (SELECT count(*) FROM cases) - count(*) FROM answers WHERE reader = ?",
                (reader.id,),
            ).fetchone()
            if left:
                raise Refused(f"{left} cases are not answered yet")
            self.db.execute(
                "UPDATE readers SET finished = ? WHERE id = ?", (time.time(), reader.id)
            )

    def _check_open(self, reader: Reader) -> None:
        (finished,) = self.db.execute(
            "SELECT finished FROM readers WHERE id = ?", (reader.id,)
        ).fetchone()
        if finished is not None:
            raise Refused("this reader has finished; answers are closed")
