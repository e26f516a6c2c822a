"""The Triton column: a file a family."""
