"""Reading text with one clear line for what is wrong, writing files whole or not at all, part files, digests."""

import errno
import glob
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from malpyeong.errors import InputError

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
_IN_WORDS = re.compile(r"\(os error (\d+)\)")  # as safetensors and tokenizers have it
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container.*unexpected pos", re.DOTALL)


def read_bytes(path: Path, expected: str) -> bytes:
    """Read a file that is not empty.

    Args:
        path: the file.
        expected: what should be in it, for the message: "a JSON list of records".

    Raises:
        InputError: it is missing, a folder, a pipe, unreadable or empty.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # it might never end
        raise InputError(f"{path}: is a pipe or device; write its content into a file and name that")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {missing_cure(path)}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; name the file in it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not data.strip():
        raise InputError(f"{path}: is empty; expected {expected}")
    return data


def missing_cure(path: Path) -> str:
    """Return what to do about a missing file or folder: its name may be there in the other normal form."""
    twin = nfd_twin(path)
    if twin is None:
        return "check the path"
    if twin.is_dir():
        return "one of this name in decomposed form (NFD, from macOS) is there: rename it"
    command = shlex.join(["python", "-m", "malpyeong.nfd", str(path), "-o", str(path)])
    return f"one of this name in decomposed form (NFD, from macOS) is there: {command} writes it under this one"


def nfd_twin(path: Path) -> Path | None:
    """Return the path that is there where ``path`` is not and only the normal form of its names differs."""
    twin = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        names = (part, unicodedata.normalize("NFD", part), unicodedata.normalize("NFC", part))
        step = next((twin / name for name in names if (twin / name).exists()), None)
        if step is None:
            return None
        twin = step
    return twin if twin != path else None


def read_text(path: Path, expected: str) -> str:
    """Read a UTF-8 file that is not empty; see :func:`read_bytes`.

    Raises:
        InputError: also if it is an archive or in another encoding.
    """
    data = read_bytes(path, expected)
    if data.startswith(b"PK\x03\x04"):
        raise InputError(f"{path}: is a zip archive (or docx/xlsx); expected {expected}")
    if data.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: is gzip-compressed; unpack it first")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: is UTF-16; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data":
            raise InputError(f"{path}: ends in the middle of a character; is the file cut off?") from None
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}: line {line} is not UTF-8 (CP949/EUC-KR perhaps); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; expected {expected}")
    return text


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text; see :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that ``path`` holds either its old content or all of the new one.

    Raises:
        InputError: the folder is missing or not writable, or ``path`` is a folder.
    """
    temporary = _temporary_beside(path)
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise not_written(path, error.strerror) from None
    finally:
        temporary.unlink(missing_ok=True)


def not_written(path: Path, reason: str | None) -> InputError:
    """Return the error for a place that cannot be written."""
    return InputError(
        f"{path}: cannot be written ({reason}); make room or choose a writable place, and start the same command again "
        "(training: with --resume auto)"
    )


def write_problem(error: BaseException | None) -> str | None:
    """Return why something could not be written, where that is what an error of any library comes from, else None."""
    while error is not None:
        in_words = _IN_WORDS.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(in_words[1]) if in_words else None
        if number in _NOT_WRITABLE:
            return os.strerror(number)
        if _TORCH_WRITER.search(str(error)):  # torch does not say
            return "is the disk full?"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what libraries raise where ``path`` cannot be written into one line.

    Raises:
        InputError: the disk is full, or no one may write there; whatever else is raised inside comes through.
    """
    try:
        yield
    except click.ClickException:
        raise
    except Exception as error:
        reason = write_problem(error)
        if reason is None:
            raise
        raise not_written(path, reason) from None


def check_writable(path: Path, *sources: str | Path | None) -> None:
    """Make sure, before long work, that its result can be written, and not over what it is made from.

    Raises:
        InputError: as :func:`write_bytes` would, or ``path`` is one of the ``sources`` that are there.
    """
    for source in sources:
        if source and path.exists() and Path(source).exists() and path.samefile(source):
            raise InputError(f"{path}: would overwrite an input; choose another name")
    _temporary_beside(path).unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path`` that becomes ``path`` when the block ends without an error.

    What a killed earlier attempt left behind is removed.

    Raises:
        InputError: ``path`` exists already and is not an empty folder, or its parent is not writable.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path}: exists already; remove it or choose another folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in path.parent.glob(f".{glob.escape(path.name)}.part-*"):
            shutil.rmtree(stale)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.part-", dir=path.parent))
    except OSError as error:
        raise not_written(path, error.strerror) from None
    try:
        with writing(path):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            if path.exists():
                path.rmdir()
            temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class PartFile:
    """The finished pieces of long work in a file beside its result, so that a killed run resumes there.

    The first line says what the work is made of (digests, settings); each other line is a piece, as JSON. A line that a
    kill tore is cut off. The file appears with the first piece.

    Attributes:
        path: the file, which need not exist.
        pieces: what earlier starts have finished.

    Raises:
        InputError: the file holds pieces of other work, or is damaged.
    """

    def __init__(self, path: Path, made_of: Mapping[str, Any]) -> None:
        self.path = path
        self.pieces: list[Any] = []
        self._header = json.dumps(made_of, ensure_ascii=False)
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror}); remove it to start again") from None
        whole = data[: data.rfind(b"\n") + 1]
        expected = json.loads(self._header)
        try:
            header, *self.pieces = [json.loads(line) for line in whole.splitlines()] or [expected]
            different = [key for key in {**expected, **header} if expected.get(key) != header.get(key)]
        except (ValueError, TypeError):
            raise self.damaged() from None
        if different:
            raise InputError(
                f"{self.path}: holds the work of an unfinished run with another {' and '.join(different)}; go on "
                "with the same command, or remove the file to start again"
            )
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))

    def damaged(self) -> InputError:
        """Return the error for pieces that are not what the work's own are like."""
        return InputError(f"{self.path}: is damaged; remove it to start again")

    def add(self, piece: Any) -> None:  # noqa: ANN401 -- anything that JSON can hold
        """Write a finished piece down.

        Raises:
            InputError: the file cannot be written; what is in it stays usable.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                if not file.tell():
                    file.write(self._header + "\n")
                file.write(json.dumps(piece, ensure_ascii=False) + "\n")
        except OSError as error:
            raise not_written(self.path, error.strerror) from None

    def remove(self) -> None:
        """Delete the file: the result is there."""
        self.path.unlink(missing_ok=True)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _temporary_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InputError(f"{path}: is a folder; name a file to write")
        prefix = f".write-{zlib.crc32(path.name.encode()):08x}-"  # the name itself may be too long for more
        for stale in path.parent.glob(f"{prefix}*"):  # of a killed earlier attempt
            stale.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix=prefix, dir=path.parent)
    except OSError as error:
        raise not_written(path, error.strerror) from None
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
