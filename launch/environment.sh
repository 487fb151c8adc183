# Sourced by quickstart.sh and tests/run.sh: a Python environment with minillm installed.
# usage: . launch/environment.sh [EXTRAS]     (from the repository's root)
#
# Uses the active virtual or conda environment, else makes .venv (of PYTHON, default python3). Installs the versions of
# launch/constraints.txt, once, and again when setup.py, the constraints or the mode changes.
#   MINILLM_NEWEST=1       the newest versions that setup.py admits instead
#   MINILLM_NO_INSTALL=1   takes the python on PATH as it is and installs nothing: a container, a machine without network
#   MINILLM_TORCH_INDEX    an extra package index for torch (empty: none); default: see launch/torch_index.py

if [ "${MINILLM_NO_INSTALL:-}" = 1 ]; then
    export PYTHONPATH="$(pwd)${PYTHONPATH:+:$PYTHONPATH}"
    return
fi
_stop() { printf '%s\n' "error: $1" >&2; exit 2; }

if [ -z "${VIRTUAL_ENV:-}" ] && [ -z "${CONDA_PREFIX:-}" ]; then
    _python=${PYTHON:-python3} _new=yes
else
    _python=python _new=
fi
command -v "$_python" >/dev/null || _stop "there is no $_python: install Python 3.10 or newer, or set PYTHON=/path/to/it"
"$_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || _stop \
    "minillm needs Python 3.10 or newer; $(command -v "$_python") is $("$_python" --version 2>&1): set PYTHON=/path/to/a/newer/one and leave the active environment, if any"
[ -w . ] || _stop \
    "$(pwd) is read-only, and installing, data/ and runs/ write here: copy or clone it to a folder that you may write to"
if [ "$_new" ]; then
    # Without pip in it, an environment was left half made.
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -c 'import pip' 2>/dev/null; then
        "$_python" -c 'import venv, ensurepip' 2>/dev/null || _stop \
            "$_python has no venv module: install it (Debian, Ubuntu: apt install python3-venv), or activate an environment that you made (conda, virtualenv, uv venv --seed)"
        echo "== making the environment .venv"
        "$_python" -m venv --clear .venv || _stop "no environment could be made in $(pwd)/.venv (the reason is above)"
    fi
    . .venv/bin/activate
fi
python -c 'import pip' 2>/dev/null || _stop \
    "the active environment ($(command -v python)) has no pip: python -m ensurepip, or uv pip install pip, puts it in"

_extras=${1:-}
_prefix=$(python -c 'import sys; print(sys.prefix)')
_stamp="$_prefix/.minillm-installed"   # what was asked for, then a line for each set of extras that is in
_constraints=launch/constraints.txt
if python -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null &&
    { [ ! -e "$_stamp" ] || grep -qx "torch is the user's" "$_stamp"; }; then
    # A torch that was there before us fits this machine's driver: it stays as long as setup.py admits it.
    _constraints="$_prefix/.minillm-constraints.txt"
    grep -v '^torch=' launch/constraints.txt >"$_constraints"
fi
_how=(-c "$_constraints")
[ "${MINILLM_NEWEST:-}" != 1 ] || _how=(--upgrade --upgrade-strategy eager)
_wanted="$(cat setup.py launch/constraints.txt | cksum) $(pwd) ${_how[*]}"
if [ "$(head -n 1 "$_stamp" 2>/dev/null)" != "$_wanted" ] || ! grep -qx "extras: $_extras" "$_stamp"; then
    echo "== installing minillm into $_prefix (a few minutes the first time)"
    if python -I -c 'import importlib.metadata as m; m.version("minillm")' 2>/dev/null; then
        # The name of this one before, and another project's on the index; either would stand beside minillm-stack.
        echo "== removing the distribution minillm from it: this one is named minillm-stack now"
        python -I -m pip uninstall --quiet --yes minillm
    fi
    _index=$(python launch/torch_index.py)
    python -m pip install --quiet --disable-pip-version-check ${_index:+--extra-index-url "$_index"} "${_how[@]}" \
        -e ".${_extras:+[$_extras]}" || _stop "pip could not install minillm into $_prefix (its reason is above).
Without a network: fetch the packages on a machine that has one, with the same kind of processor and the same Python,
    python -m pip download -d wheels ${_how[*]} 'setuptools>=70' wheel '.${_extras:+[$_extras]}'
copy the folder wheels here, and run this again with PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels in front; or activate an
environment that has what is needed (python -m minillm.versions shows what is missing in it)."
    if [[ $_prefix == *" "* && -e "$_prefix/bin/deepspeed" ]]; then
        # pip gives this script a first line that no kernel can read where the path has a space.
        printf '#!/bin/sh\nexec "%s/bin/python" -m deepspeed.launcher.runner "$@"\n' "$_prefix" >"$_prefix/bin/deepspeed"
    fi
    [ "$(head -n 1 "$_stamp" 2>/dev/null)" = "$_wanted" ] || echo "$_wanted" >"$_stamp"
    echo "extras: $_extras" >>"$_stamp"
    [ "$_constraints" = launch/constraints.txt ] || echo "torch is the user's" >>"$_stamp"
fi
