#!/bin/bash
# Runs the quick tests on each PYTHON, in a new virtual environment with the versions of tools/constraints:
#     tools/test_pythons.sh [--update] PYTHON...      e.g. ~/.pyenv/versions/3.{8,12}.*/bin/python
# --update lets pip choose the versions, and writes them to tools/constraints once the tests have passed.
set -uo pipefail

clone=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
update=
[ "${1:-}" = --update ] && { update=yes; shift; }
[ $# -gt 0 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }

test_python() {  # PYTHON FOLDER: make the environment FOLDER and test in it
    local name constraints
    name=$("$1" -c 'import sys; print("python{}.{}".format(*sys.version_info))') || return
    constraints=$clone/tools/constraints/$name.txt
    echo "== $name"
    "$1" -m venv "$2" || return
    if [ -n "$update" ]; then
        "$2/bin/python" -m pip install -qq '.[cpu,test]' || return
    else
        "$2/bin/python" -m pip install -qq -c "$constraints" '.[cpu,test]' || return
    fi
    "$2/bin/python" -m pytest -q -p no:cacheprovider || return
    if [ -n "$update" ]; then
        {
            echo "# Tested on $name; made by tools/test_pythons.sh --update $name"
            "$2/bin/python" -m pip freeze --exclude gn_gluon
        } > "$constraints"
    fi
}

cd "$clone" || exit
failed=()
for python in "$@"; do
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    test_python "$python" "$work/venv" || failed+=("$python")
    rm -rf "$work"
done
echo "$# tested, ${#failed[@]} failed${failed[*]:+: ${failed[*]}}"
[ ${#failed[@]} = 0 ]
