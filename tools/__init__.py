"""What made the sample data and the tiny base model."""
