"""For `pytest --nbmake notebooks`: by the Python that runs the tests, in the profile of the tests.

The images of the miniature must be drawn; where they are not, a notebook says that `python -m dalleflamingo data` does.
"""

import os
import sys

# Kernels are looked up by their name, python3, first in the folders of JUPYTER_PATH and then in the user's: one of
# another environment may stand there under that name.
OWN = os.path.join(sys.prefix, "share", "jupyter")
os.environ["JUPYTER_PATH"] = os.pathsep.join([OWN, *filter(None, [os.environ.get("JUPYTER_PATH")])])
os.environ.setdefault("DALLEFLAMINGO_PROFILE", "smoke")  # as `make test` has it; mini would take ten times as long
