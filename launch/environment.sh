# Sourced by quickstart.sh and tests/run.sh: a Python environment with minillm installed.
# usage: . launch/environment.sh [EXTRAS]     (from the repository's root)
# Uses the active virtual or conda environment, else makes .venv; installs once, and again when setup.py changes.

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "minillm needs Python 3.10 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3" >&2
        exit 2
    }
    [ -x .venv/bin/python ] || { echo "== making the environment .venv"; "$python" -m venv .venv; }
    . .venv/bin/activate
fi

extras=${1:-}
wanted="$(cksum <setup.py) $(pwd) $extras"
stamp="$(python -c 'import sys; print(sys.prefix)')/.minillm-installed${extras:+-$extras}"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "== installing minillm into $(python -c 'import sys; print(sys.prefix)') (a few minutes the first time)"
    if python -I -c 'import importlib.metadata as m; m.version("minillm")' 2>/dev/null; then
        # The name of this one before, and another project's on the index; either would stand beside minillm-stack.
        echo "== removing the distribution minillm from it: this one is named minillm-stack now"
        python -I -m pip uninstall --quiet --yes minillm
    fi
    python -m pip install --quiet --disable-pip-version-check -e ".${extras:+[$extras]}"
    echo "$wanted" >"$stamp"
fi
