"""The contract of docs/semantics.md, statement by statement; docstrings begin with its number."""
