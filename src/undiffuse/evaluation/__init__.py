"""Evaluation: how near samples are to what they should be."""
