"""Evaluation of a data set, over blocks, files and processes, that can be interrupted and resumed."""
