"""What a model reads: a question's messages, with rules and solved examples, and the tag that names a rule."""
