"""Send what MLflow lacks of the searches in a storage folder.

python tune/sync.py STORAGE [--tracking-uri URI]     send what MLflow lacks, or all of it to another one
"""

from __future__ import annotations

import sys

from tune.tracking.replay import command

if __name__ == "__main__":
    sys.exit(command())
