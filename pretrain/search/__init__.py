"""Features of whole data sets on a disk, and what lies nearest to a text, an image or a combination of sets.

store.py is the form on the disk, which embed.py writes on all ranks and index.py reads; exact.py and approximate.py
find the nearest rows, and search.py makes answers of them.
"""
