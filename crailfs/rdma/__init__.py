"""One-sided access to another host's memory over RoCE v2, by the distribution's pyverbs.

Nothing here is imported by pyverbs' absence: ``verbs.load`` says in one sentence what is missing.
"""
