"""Choosing what a model reads beside a question: rules of the reference document and solved training questions."""
