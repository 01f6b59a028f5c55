"""Training loops in the shapes of well-known trainers, small and written anew.

Each takes the class of its scaler, as if nothing but its import had changed.
"""
