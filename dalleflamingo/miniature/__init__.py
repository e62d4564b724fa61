"""The miniature: a drawn world of known scenes, its captions, and the small models that were trained on it.

`training` made the files in `data/miniature`; only the command line and the tests import it.
"""
