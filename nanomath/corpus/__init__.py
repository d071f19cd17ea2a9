"""From web pages to a math corpus (Sec. 2.1): one file per step, joined in recall.py.

Read in this order: text.py (tokens and n-gram hashes), pages.py (the pages),
dedup.py, classifier.py, domains.py, recall.py (the loop), decontaminate.py.
"""
