"""`shardscale doctor`: look at a job from inside, under the launcher that its user has.

Every rank looks, rank 0 judges and prints, and no part waits longer than its limit. It needs torch
and numpy alone.
"""
