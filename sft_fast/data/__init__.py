"""From a source of records to a memory-mapped token store.

source.py finds the records, formats.py makes conversations of them, render.py makes tokens and the
mask of the supervised ones, build.py writes them, store.py reads them.
"""
