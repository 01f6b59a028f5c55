"""Tests on clusters: real launchers, real signals, real networks, and what becomes of a job."""
