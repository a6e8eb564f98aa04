"""The contest's files and texts: records, questions, answers, rule books. Needs no model."""
