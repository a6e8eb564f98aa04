"""The item bank, and what builds ``malpyeong/samples/data`` from it: ``python -m tools.samples.build``."""

from pathlib import Path

BANK = Path(__file__).parent / "bank"
