#!/usr/bin/env bash
# Runs a script in as many processes as there are GPUs: ./dist.sh SCRIPT ... [--gpu 0,1]
# ./dist.sh --help lists the words. What they do is in utils/launch.py.
set -euo pipefail

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)

# The environment that `make` created, unless another one is active.
python=python3
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
elif ! command -v python3 >/dev/null; then
    python=python
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m utils.launch "$@"
