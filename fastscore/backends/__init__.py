"""Implementations of the ops in `fastscore.ops`, and the choice between them."""
