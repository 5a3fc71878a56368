"""Data sets as people have them -> samples for shards: one module per published layout, `source.py` for all of them.

A source is a sequence: so many entries, each made into a sample by itself, so that any process can make any shard.
"""
