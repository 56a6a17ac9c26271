"""Runs cells in a real IPython shell, as a notebook does; reads them as JSON, and says as JSON what each showed.

`python notebook_shell.py RESULTS < CELLS`: run until a cell fails, as "Run all" does.
"""

import json
import sys
from pathlib import Path

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

shell = InteractiveShell.instance()
results = []
for source in json.load(sys.stdin):
    with capture_output() as shown:
        result = shell.run_cell(source, store_history=True)
    displays = [{"data": output.data, "update": bool(output.update)} for output in shown.outputs]
    results.append({"ok": result.success, "printed": shown.stdout + shown.stderr, "displays": displays})
    Path(sys.argv[1]).write_text(json.dumps(results, default=repr))
    if not result.success:
        break
