#!/usr/bin/env bash
# Puts pellucid with every extra and the development tools into .venv. Called by `make install`; run it from
# the project's root. PYTHON names another interpreter.
set -euo pipefail

readonly VENV=.venv NEEDED_MB=2500
readonly LOG=$VENV/install.log STAMP=$VENV/.installed

fail() {
    echo "make install: $1" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.10 or later"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3.10 python3; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or later on PATH; install one (3.11 is best), or name it: make install PYTHON=..."
}

# pip's own output goes to the log; of it, a line for each large download and one for the end are shown.
show() {
    awk '/^ *Downloading / && /\([0-9.]+ [MG]B\)/ { sub(/^ *Downloading +/, ""); sub(/.*\//, ""); big = /[0-9]{2,}[.0-9]* MB|GB/
                                                   if (big) print "  fetching " $0 }
         /^Installing collected packages/ { n = gsub(/,/, ",") + 1; print "  installing " n " packages"; fflush() }
         { fflush() }'
}

explain() {
    if grep -q "No space left on device" "$LOG"; then
        fail "the disk is full; see $LOG"
    elif grep -qE "NewConnectionError|Temporary failure in name resolution|ConnectTimeout|Network is unreachable|ProxyError" "$LOG"; then
        fail "the package index cannot be reached: is there a network? See $LOG"
    fi
    fail "$(grep -E "^ERROR" "$LOG" | tail -1 || tail -1 "$LOG") (see $LOG)"
}

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one that was not finished
    rm -rf "$VENV"
    free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_mb" -ge "$NEEDED_MB" ] || fail "needs $NEEDED_MB MB free in $PWD, found $free_mb MB"
    python=$(find_python)
    echo "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" 2>/dev/null || fail "$python cannot make a virtual environment (Debian: apt-get install python3-venv)"
fi
echo "installing pellucid, its extras and the development tools into $VENV (some minutes the first time)"
"$VENV/bin/python" -m pip install --disable-pip-version-check --progress-bar off --retries 2 \
    -c deploy/constraints.txt -e '.[dev]' 2>&1 | tee "$LOG" | show || explain
touch "$STAMP"
echo "installed"
