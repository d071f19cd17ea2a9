# Sourced by speedrun.sh, test.sh and .ci/run: a virtual environment with the project and its pinned
# versions. Needs python3 (3.11 to 3.14) with venv, and bash; nothing is compiled, and nothing is
# written but $VENV. A second call returns at once and opens no connection. PYTHON chooses the
# interpreter, VENV the folder, TORCH another release of torch (with the triton it asks for).

# OpenMP threads wait for one another by spinning. Where another process holds one of two cores that
# makes a training step 30 times slower (dev/LOG.md); a short spin costs nothing on an idle machine.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-20000}"

say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
fail() { printf 'nanomath: %s\n' "$*" >&2; return 1; }

# The scripts go to the source folder first: a relative path is meant from where they were called.
from_caller() { case "$CALLER_DIR:$1" in "$PWD":* | *:/*) printf %s "$1" ;; *) printf %s "$CALLER_DIR/$1" ;; esac; }

if [ -n "${NANOMATH_DATA:-}" ]; then NANOMATH_DATA=$(from_caller "$NANOMATH_DATA"); fi

find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11 python3.14)
    case "${PYTHON:-}" in
        "") ;;
        */*) candidates=("$(from_caller "$PYTHON")") ;;
        *) candidates=("$PYTHON") ;;
    esac
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 to 3.14; found none as ${PYTHON:-python3}. Set PYTHON=/path/to/python3.13"
}

# The CPU build of torch is a tenth of the size; take it where there is no NVIDIA GPU and it can be had.
torch_index() {
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then return; fi
    local url=https://download.pytorch.org/whl/cpu
    if "$VENV/bin/python" -c "import urllib.request as u; u.urlopen('$url/torch/', timeout=5).read(1)" 2>/dev/null; then
        printf -- '--extra-index-url %s' "$url"
    fi
}

install() { # PYTHON EXTRA
    local pip=(env PIP_USER=0 "$VENV/bin/python" -m pip install -q --disable-pip-version-check --no-build-isolation)
    say "setting up $VENV (once, a few minutes)"
    rm -f "$VENV/set-up"
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        "$1" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$1 cannot make a virtual environment; on Debian or Ubuntu: apt install $("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" || return 1
        "$1" -m venv "$VENV" || fail "cannot make $VENV: remove that folder, or set VENV to another" || return 1
    fi
    # An editable install writes beside its setup.py: this one lies in $VENV, so the source may be read-only.
    mkdir -p "$VENV/src" && ln -sfn "$PWD"/{setup.py,pyproject.toml,nanomath,kernels} "$VENV/src/" || return 1
    sed "${TORCH:+/^triton==/d; s/^torch==.*/torch==$TORCH/}" constraints.txt >"$VENV/constraints.txt" || return 1
    # shellcheck disable=SC2046  # the index option is two words or none
    "${pip[@]}" "setuptools>=77" && # for the build; not pinned, as each torch has its own upper bound
        "${pip[@]}" -c "$VENV/constraints.txt" $(torch_index) -e "$VENV/src${2:+[$2]}" ||
        fail "the set-up did not end, see above: is PyPI within reach? The same command continues" || return 1
    echo "$(key): $2" >"$VENV/set-up"
}

# Of the last set-up that ended, "$VENV/set-up" has the key, which changes with all that asks for
# another one, and the extra.
key() { cksum setup.py constraints.txt - <<<"$PWD ${TORCH:-} $("$VENV/bin/python" -V 2>/dev/null)" | cksum; }
is_set_up() { case "$(cat "$VENV/set-up" 2>/dev/null)" in "$(key): "*"$1"*) ;; *) return 1 ;; esac; }

# setup_environment EXTRA: "" for running, "test" for the tests.
setup_environment() {
    local python
    VENV=$(from_caller "${VENV:-$PWD/.venv}")
    case "${TORCH:-}" in *[!0-9A-Za-z.+]*) fail "TORCH is '$TORCH', but must be a version, as 2.14.1" || return 1 ;; esac
    if [ -n "${PYTHON:-}" ] && [ -x "$VENV/bin/python" ]; then
        python=$(find_python) || return 1
        [ "$("$python" -V)" = "$("$VENV/bin/python" -V)" ] ||
            fail "$VENV is not of PYTHON=$PYTHON: remove that folder, or set VENV to another" || return 1
    fi
    if is_set_up "$1"; then return; fi
    python=$(find_python) || return 1
    mkdir -p "$VENV" 2>/dev/null && [ -w "$VENV" ] ||
        fail "cannot write $VENV: set VENV to a folder of your own" || return 1
    (
        # One set-up at a time: bash cannot lock, but a child can, on a handle that it shares.
        "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null ||
            { say "waiting for another set-up of $VENV"; "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; } || exit 1
        is_set_up "$1" || install "$python" "$1"
    ) 9>"$VENV/lock"
}
