#!/usr/bin/env bash
# What a first run on a GPU must show, in one go; every step has a log, and none stops the others.
#
#     bench/gpu_first.sh [FOLDER]        results, default build/gpu
#
# PYTHON names the interpreter (default .venv/bin/python, else python3). WHEELS names a folder of
# wheels for a machine without a network: lowbit's requirements are installed from there, into an
# environment of the results' folder that sees what the machine has. STEPS names some of the steps
# (machine tests small memcheck racecheck cutlass bench tune); without it all are run, within half
# an hour.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)

python=${PYTHON:-}
[ -n "$python" ] || { [ -x .venv/bin/python ] && python=.venv/bin/python || python=python3; }
export PYTHONPATH="$PWD/src:$PWD/tests/emulator${PYTHONPATH:+:$PYTHONPATH}" LOWBIT_TUNING=off
export LOWBIT_CACHE_DIR=${LOWBIT_CACHE_DIR:-$out/kernels} # compiled once for all steps

failed=()
step() { # name, most seconds, command ...
    local name=$1 most=$2 started=$SECONDS
    shift 2
    [[ " ${STEPS:-$name} environment wheels " == *" $name "* ]] || return 0
    echo "== $name"
    if timeout "$most" "$@" > "$out/$name.log" 2>&1; then
        echo "ok, $((SECONDS - started)) s: $(tail -n 1 "$out/$name.log")"
    else
        echo "FAILED ($?), $((SECONDS - started)) s; the end of $out/$name.log:"
        tail -n 15 "$out/$name.log"
        failed+=("$name")
    fi
}

if [ -n "${WHEELS:-}" ]; then
    step environment 60 "$python" -m venv --system-site-packages "$out/venv"
    python=$out/venv/bin/python
    step wheels 120 "$python" -m pip install --disable-pip-version-check -q --no-index \
        --find-links "$WHEELS" "$WHEELS"/*.whl
fi

absent='import sys; sys.path.insert(0, "bench"); from harness import gpu_device as g; sys.exit(g.absence())'
"$python" -P -c "$absent" || exit 1

# Only these have a test for a device; others may want packages that are not here.
mapfile -t tests < <(grep -lE 'mark\.gpu|launcher\.launch' tests/test_*.py)
sanitize=(compute-sanitizer --error-exitcode 1 --launch-timeout 0)

step machine 30 nvidia-smi -q
step tests 240 "$python" -P -m pytest -q -m gpu -c /dev/null --rootdir . --import-mode=importlib \
    -p no:cacheprovider --junitxml "$out/tests.xml" "${tests[@]}"
step small 120 "$python" -P bench/gpu_small.py
step memcheck 300 "${sanitize[@]}" --tool memcheck "$python" -P bench/gpu_small.py
step racecheck 300 "${sanitize[@]}" --tool racecheck "$python" -P bench/gpu_small.py --every 5
step cutlass 300 "${sanitize[@]}" --tool memcheck "$python" -P -m pytest -q -m gpu -c /dev/null \
    --rootdir . --import-mode=importlib -p no:cacheprovider tests/test_cutlass_gpu.py
step bench 600 "$python" -P bench/gpu.py --quick --json "$out/gpu.json"
step tune 180 "$python" -P bench/tune_cutlass.py --json "$out/tiles.json"

if ((${#failed[@]})); then
    echo "failed: ${failed[*]}; logs are in $out"
    exit 1
fi
echo "all is well; results are in $out"
