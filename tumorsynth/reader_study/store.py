"""The SQLite file of a reader study: cases with their truth, readers, answers.

Each change is a transaction in WAL mode, and is on the disk before the page shows that it is saved.
The file holds the truth, which the server never sends; only its owner may read the file.
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

FORMAT = 1  # of the file
ANSWERS = ("real", "synthetic")
CONFIDENCE = range(1, 6)  # a guess ... certain
MAX_NAME_LETTERS = 80
MAX_SECONDS = 1e6  # for one answer

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
    """A request that a reader may not make, or a malformed answer."""


@dataclass(frozen=True)
class Reader:
    """A reader. id: opaque, used by the page. finished: answers cannot change any more."""

    id: str
    name: str
    seed: str
    finished: bool


@dataclass(frozen=True)
class Answer:
    """A reader's answer to a case, with the truth. seconds: time the case was on the screen."""

    reader: str
    case: str
    truth: str
    answer: str
    confidence: int
    seconds: float


class Store:
    """An open study file.

    Args:
        path: the file; it is created if it does not exist.
        write: False to only read, while a server may be writing.

    Raises:
        FileNotFoundError: if there is no file to read, or no folder to create it in.
        OSError: if the file cannot be written.
        ValueError: for a file that is no study, or of another format.

    Examples:
        >>> with contextlib.closing(Store(Path("answers.sqlite"), write=False)) as store:
        ...     print(study_results(store)["rows"])
    """

    def __init__(self, path: Path, *, write: bool = True):
        self.path = Path(path)
        self.lock = threading.Lock()
        if not write and not self.path.is_file():
            raise FileNotFoundError(
                f"no such file: {self.path}; create it with `reader-study serve`"
            )
        if write and not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"no such folder: {self.path.parent}; create it, or give another --db"
            )
        if write:
            self.path.touch(mode=0o600)  # only the owner may read the truth
        uri = f"{self.path.resolve().as_uri()}?mode={'rwc' if write else 'ro'}"
        try:
            self.db = sqlite3.connect(
                uri, uri=True, timeout=10, isolation_level=None, check_same_thread=False
            )
            if write:
                self._prepare_to_write()
            format = self._get("format")
        except sqlite3.DatabaseError as error:
            if "disk" in str(error):  # full or failing
                raise OSError(
                    f"the answers cannot be written to {self.path} ({error}); make room, or choose "
                    "another --db"
                ) from error
            raise ValueError(f"{self.path} is not a reader study's file ({error})") from error
        if format != str(FORMAT):
            raise ValueError(
                f"{self.path} must have format {FORMAT}, got {format}; use the version of "
                "tumorsynth that wrote it"
            )

    def _prepare_to_write(self) -> None:
        """Set the modes of the file, and create its tables if it is empty."""
        if not self._is_empty():
            self._get("format")  # fails for the file of another program, which stays as it is
        self.db.execute("PRAGMA journal_mode = WAL")
        self.db.execute("PRAGMA synchronous = FULL")
        self.db.execute("PRAGMA foreign_keys = ON")
        with self._change():
            if self._is_empty():
                for statement in _TABLES.split(";\n"):
                    self.db.execute(statement)
                self._put("format", str(FORMAT))
                # part of the page's address, which other accounts and pages cannot guess
                self._put("token", secrets.token_urlsafe(16))

    def _is_empty(self) -> bool:
        return self.db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A transaction, rolled back on errors."""
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
        rows = self._rows("SELECT value FROM study WHERE key = ?", key)
        return rows[0][0] if rows else None

    @property
    def token(self) -> str:
        """Secret part of the page's address; it never changes for a study."""
        return str(self._get("token"))

    def set_up(self, cases: Sequence[tuple[str, str, str]]) -> list[str]:
        """Register the cases, or check that they are those of the study.

        Args:
            cases: (truth, source, SHA-256 of the blinded volume) of each.

        Returns:
            Their opaque ids.

        Raises:
            ValueError: for equal names, or if the study holds other cases or other voxels.
        """
        current = {(truth, source): sha for truth, source, sha in cases}
        if len(current) != len(cases):
            raise ValueError("each case needs its own file name within its folder; rename some")
        with self._change():
            if self.db.execute("SELECT count(*) FROM cases").fetchone() == (0,):
                rows = [
                    (secrets.token_hex(8), truth, source, sha)
                    for (truth, source), sha in current.items()
                ]
                # sorted by id, so that the order of the rows reveals nothing
                self.db.executemany("INSERT INTO cases VALUES (?, ?, ?, ?)", sorted(rows))
            known = {
                (truth, source): (case, sha)
                for case, truth, source, sha in self.db.execute("SELECT * FROM cases")
            }
        changed = [
            k for k in current.keys() | known.keys() if known.get(k, "")[1:] != (current.get(k),)
        ]
        if changed:
            raise ValueError(
                f"{self.path} belongs to a study of other cases: {len(changed)} of them are new, "
                "missing or changed; give the same folders and options, or another --db"
            )
        return [known[truth, source][0] for truth, source, _ in cases]

    def reader(self, name: str) -> Reader:
        """Return the reader of this name, created if new; case is ignored.

        Raises:
            Refused: for a name that is empty, too long or not printable.
        """
        name = " ".join(name.split())
        if not 1 <= len(name) <= MAX_NAME_LETTERS or not name.isprintable():
            raise Refused(f"a reader's name must have 1 to {MAX_NAME_LETTERS} letters")
        with self._change():
            self.db.execute(
                "INSERT INTO readers VALUES (?, ?, ?, ?, NULL) ON CONFLICT (name) DO NOTHING",
                (secrets.token_hex(16), name, secrets.token_hex(16), time.time()),
            )
        return self._readers("name = ? COLLATE NOCASE", name)[0]

    def reader_of(self, reader: str) -> Reader:
        """Return the reader with this opaque id; raise Refused if there is none."""
        readers = self._readers("id = ?", reader)
        if not readers:
            raise Refused("this reader is unknown; reload the page")
        return readers[0]

    def readers(self) -> list[Reader]:
        """Return all readers, in the order in which they started."""
        return self._readers("1")

    def _readers(self, where: str, *values: Any) -> list[Reader]:
        rows = self._rows(
            f"SELECT id, name, seed, finished FROM readers WHERE {where} ORDER BY started", *values
        )
        return [Reader(key, name, seed, at is not None) for key, name, seed, at in rows]

    def order(self, reader: Reader) -> list[str]:
        """Return all cases in the reader's own random order, which never changes."""
        cases = [case for (case,) in self._rows("SELECT id FROM cases")]
        return sorted(cases, key=lambda c: hashlib.sha256((reader.seed + c).encode()).digest())

    def answers(self, reader: Reader) -> list[Answer]:
        """Return all answers of a reader."""
        rows = self._rows(
            "SELECT case_id, truth, answer, confidence, seconds FROM answers "
            "JOIN cases ON cases.id = case_id WHERE reader = ?",
            reader.id,
        )
        return [Answer(reader.name, *row) for row in rows]

    def save(self, reader: Reader, case: str, answer: str, confidence: int, seconds: float) -> None:
        """Save an answer; it replaces the reader's earlier one to this case and adds its time.

        Args:
            reader: who answers.
            case: opaque id.
            answer: "real" or "synthetic".
            confidence: 1 (a guess) to 5 (certain).
            seconds: time the case was on the screen since the last save.

        Raises:
            Refused: for a malformed answer, an unknown case, or a reader who has finished.
        """
        if answer not in ANSWERS:
            raise Refused(f"an answer must be {' or '.join(ANSWERS)}, got {answer!r}")
        if type(confidence) is not int or confidence not in CONFIDENCE:
            raise Refused(f"a confidence must be a whole number from 1 to 5, got {confidence!r}")
        if type(seconds) not in (int, float) or not 0 <= seconds < MAX_SECONDS:
            raise Refused(f"seconds must be from 0 to {MAX_SECONDS:g}, got {seconds!r}")
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
        """Close the reader's answers.

        Raises:
            Refused: if some are missing, or the reader has finished before.
        """
        with self._change():
            self._check_open(reader)
            (left,) = self.db.execute(
                "SELECT (SELECT count(*) FROM cases) - count(*) FROM answers WHERE reader = ?",
                (reader.id,),
            ).fetchone()
            if left:
                raise Refused(f"{left} cases are not answered yet; answer all of them first")
            self.db.execute(
                "UPDATE readers SET finished = ? WHERE id = ?", (time.time(), reader.id)
            )

    def _check_open(self, reader: Reader) -> None:
        (finished,) = self.db.execute(
            "SELECT finished FROM readers WHERE id = ?", (reader.id,)
        ).fetchone()
        if finished is not None:
            raise Refused("this reader has finished; answers are closed")
