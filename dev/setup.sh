# Sourced by speedrun.sh and test.sh: a virtual environment with the project and its pinned
# versions. Needs python3 (3.11 to 3.14), pip and bash; nothing is compiled. A second call returns
# at once. PYTHON chooses the interpreter, VENV the folder.

# OpenMP threads wait for one another by spinning. Where another process holds one of two cores that
# makes a training step 30 times slower (dev/LOG.md); a short spin costs nothing on an idle machine.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.14 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "nanomath needs Python 3.11 to 3.14; found none as ${PYTHON:-python3}. Set PYTHON=/path/to/python3.12" >&2
    return 1
}

# The CPU build of torch is a tenth of the size; take it where there is no NVIDIA GPU and it can be had.
torch_index() {
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then return; fi
    local url=https://download.pytorch.org/whl/cpu
    if "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('$url/torch/', timeout=5).read(1)" 2>/dev/null; then
        printf -- '--extra-index-url %s' "$url"
    fi
}

# setup_environment EXTRA: "" for running, "[test]" for the tests.
setup_environment() {
    local extra="$1" python key
    VENV="${VENV:-.venv}"
    python=$(find_python) || return 1
    key=$(cat setup.py constraints.txt dev/setup.sh | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.version.encode() + sys.stdin.buffer.read()).hexdigest()[:16])')
    local stamp="$VENV/nanomath$extra-$key"
    if [ ! -e "$stamp" ]; then
        say "setting up $VENV (once)"
        [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" || return 1
        # shellcheck disable=SC2046  # the index option is two words or none
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt \
            $(torch_index) torch || return 1
        "$VENV/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt \
            -e ".$extra" || return 1
        touch "$stamp"
    fi
}
