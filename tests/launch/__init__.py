"""Tests of what lies in ``launch/``."""
