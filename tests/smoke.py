"""What a clean environment runs after installing lowbit from a wheel or a source distribution."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np

import lowbit
from lowbit import formats, kernels

site = Path(sysconfig.get_path("purelib"))
for module in lowbit, formats, kernels:
    assert module.__file__
    assert Path(module.__file__).is_relative_to(site), f"{module.__file__} is not below {site}"
assert not {"numba", "llvmlite", "torch", "jax", "rich", "typer"} & set(sys.modules)

# Small integers: every kernel must be exact.
integers = (np.arange(40 * 96).reshape(40, 96) % 15 - 7).astype(np.float32)
x = integers[:3]
w = lowbit.quantize(integers, "int4_g32")
assert (x @ w.T == x @ integers.T).all()
compiled = lowbit.explain(x, w.T).kernel
assert compiled != "reference", "no compiled kernel took an ordinary problem"

done = subprocess.run(
    [sys.executable, "-P", "-m", "lowbit", "doctor", "--json"],
    capture_output=True,
    text=True,
    check=True,
)
findings = {each["item"]: each for each in json.loads(done.stdout)["findings"]}
assert findings["lowbit"]["value"] == lowbit.__version__

script = Path(sysconfig.get_path("scripts"), "lowbit")
subprocess.run([str(script), "--help"], check=True, stdout=subprocess.DEVNULL)

print(f"lowbit {lowbit.__version__}: installed; {compiled} is exact; doctor is content")
