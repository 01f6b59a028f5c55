"""A loss scaler for sharded training: every rank gets the same verdict, from one small all-reduce."""

__version__ = "0.1.0"
