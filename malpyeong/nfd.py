"""Put the syllables of a file from macOS together: ``python -m malpyeong.nfd FILE -o OUTPUT``."""

import re
from pathlib import Path

import click

from malpyeong.contest.nfd import compose
from malpyeong.errors import counted
from malpyeong.files import check_writable, nfd_twin, read_text, write_text
from malpyeong.terminal import Command

# Jamo as JSON may write them, and every other escape, so that none is read from its middle.
_ESCAPE = re.compile(r"\\(?:u(11[0-9a-f]{2}|a9[67][0-9a-f]|d7[b-f][0-9a-f])|.)", re.IGNORECASE | re.DOTALL)


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
def main(file: Path, output: Path) -> None:
    """Write FILE with whole Hangul syllables where they are in pieces (NFD). Nothing else changes: jamo, old Hangul and
    hanja stay as they are, which normalising a text to NFC or NFKC does not promise.

    FILE is found under its name in either form.
    """
    source = nfd_twin(file) or file
    check_writable(output, source)
    text = read_text(source, "text")
    if source.suffix.lower() in (".json", ".jsonl"):
        text = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)) if escape[1] else escape[0], text)
    text, count = compose(text)
    write_text(output, text)
    click.echo(f"{output}: {counted(count, 'syllable')} put together, nothing else changed")


if __name__ == "__main__":
    main()
