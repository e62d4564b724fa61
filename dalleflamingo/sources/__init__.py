"""Readers of published data sets and of a user's own files: folders of images, captions, tables of both, shards."""
