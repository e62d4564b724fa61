"""The miniature world, and the training of its models.

Nothing outside this package imports it: what it makes are files.
"""
