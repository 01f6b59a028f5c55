"""Tests that need several ranks: real processes, real Gloo groups, no GPU."""
