"""For `pytest --nbmake`: notebooks are run by the Python that runs the tests."""

import os
import sys

# Kernels are looked up by their name, python3, first in the folders of JUPYTER_PATH and then in the user's: one of
# another environment may stand there under that name.
OWN = os.path.join(sys.prefix, "share", "jupyter")
os.environ["JUPYTER_PATH"] = os.pathsep.join([OWN, *filter(None, [os.environ.get("JUPYTER_PATH")])])
