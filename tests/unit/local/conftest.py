"""ministack writes a key into STATE_DIR, by default under /tmp, when it is imported: here into a folder that goes."""

import os
import tempfile

_state = tempfile.TemporaryDirectory(prefix="houndloop-")
os.environ["STATE_DIR"] = _state.name
