"""Restores a backup over what is there; the environment says where the process dies. Arguments: backup, home."""

import sys
from datetime import UTC, datetime
from pathlib import Path

from storage.restore import restore

restore(Path(sys.argv[1]), Path(sys.argv[2]), replace=True, now=datetime.now(UTC))
