"""Python started in a clone takes the sources that lie there instead of what is installed, and they run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CALL = "import fastscore.kernels.names as names, fastscore as fs, torch; print(fs.__file__, names.__file__)"


def test_the_sources_run_where_they_lie(tmp_path):
    for name in ("fastscore", "kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    # What is installed as editable finds the sources' kernels by itself, so that its finder is taken away.
    call = "import sys; sys.meta_path[:] = [each for each in sys.meta_path if type(each).__module__ != NAME]; " + CALL
    call = call.replace("NAME", repr("_editable_skbc_fastscore"))
    done = subprocess.run([sys.executable, "-c", call], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, kernels = done.stdout.split()
    assert Path(package) == tmp_path / "fastscore" / "__init__.py"
    assert Path(kernels) == tmp_path / "kernels" / "names.py"
