"""Invented sample data in the contest's form, an own-words rule book, and a tiny model made from them."""

from pathlib import Path

FOLDER = Path(__file__).parent
DATA = FOLDER / "data"
TINY_BASE = FOLDER / "tiny_base"
