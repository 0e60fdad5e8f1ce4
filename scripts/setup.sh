# Sourced by the scripts that need an environment. Sets PYTHON to one that has the pinned packages:
# an activated conda or virtual environment that has torch and transformers, else .venv, made if it is missing or its
# pins have changed.

project=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
export PYTHONPATH="$project/src${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1 # a file in the current folder may have the name of a module

has_packages() {
    "$1" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ["torch", "transformers", "accelerate"])))' 2>/dev/null
}

find_python() { # the first Python 3.11 or newer on PATH
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "splitwiser: Python 3.11 or newer is needed, and none is on PATH" >&2
    return 2
}

install() { # says what it does ($1), and on a terminal shows pip's own progress
    local quiet=--quiet
    [ -t 2 ] && quiet=
    echo "$1" >&2
    "$project/.venv/bin/python" -m pip --disable-pip-version-check install $quiet "${@:2}" >&2
}

make_venv() {
    local python stamp
    stamp=$(cat "$project/env/requirements.txt" "$project/pyproject.toml" | sha256sum | cut -d' ' -f1)
    [ "$(cat "$project/.venv/splitwiser-pins" 2>/dev/null)" = "$stamp" ] && return
    python=$(find_python) || return
    echo "setting up $project/.venv (once; this takes some minutes)" >&2
    echo "1/4 an environment of $("$python" --version)" >&2
    "$python" -m venv "$project/.venv" || {
        echo "splitwiser: $python cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2
        return 1
    }
    # torch first and by itself: what else asks for torch must find it there
    install "2/4 PyTorch, the largest part" "$(grep '^torch==' "$project/env/requirements.txt")" &&
        install "3/4 transformers and the other packages" -r "$project/env/requirements.txt" &&
        install "4/4 splitwiser itself" --no-deps -e "$project" || {
        echo "splitwiser: setting up $project/.venv failed; the lines above say why, and the next start tries again" >&2
        return 1
    }
    echo "$stamp" >"$project/.venv/splitwiser-pins"
}

active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
if [ -n "$active" ] && [ "$active" != "$project/.venv" ] && has_packages "$active/bin/python"; then
    PYTHON=$active/bin/python
    echo "using the active environment $active" >&2
else
    { # one at a time: two first starts side by side would build into the same folder
        if command -v flock >/dev/null; then flock 9; fi
        make_venv || exit
    } 9>"$project/.venv.lock"
    PYTHON=$project/.venv/bin/python
fi
