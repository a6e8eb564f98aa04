"""malpyeong: from the files of a Korean grammar-QA contest to a checked submission on one GPU."""

__version__ = "0.1.0"
