"""Reading the results of an earlier measurement: a file that is not there is a sentence, not a traceback."""

import json
import sys
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """What a file holds; ends the script with one sentence and code 2 where it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except ValueError as error:
        reason = f"it is not JSON ({error})"
    print(f"error: {path} cannot be read: {reason}", file=sys.stderr)
    raise SystemExit(2)
