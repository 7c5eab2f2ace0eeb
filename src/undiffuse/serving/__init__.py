"""Serving: many requests, one network."""
