"""The contest's scorer, to the letter. Nothing in here loads torch at import time."""
