"""Arms the shim of a process that was started with this folder on PYTHONPATH."""

import os
import sys

if text := os.environ.get("FAULTS_SHIM"):
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import shim

    sys.path.pop(0)
    shim.arm(text)
