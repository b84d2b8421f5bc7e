"""Scripts that are no part of the package: checks, and the training of the demo model."""
