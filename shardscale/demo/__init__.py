"""The demo: a small model trained in float16 on several ranks, one of which overflows.

Read in this order: ``options`` (what is asked), ``start`` (the ranks), ``job`` and ``training``
(what each of them does), ``agreement`` (the verdict over them), ``play`` (all of it, as `shardscale
demo` runs it).
"""
