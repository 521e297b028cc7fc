#!/usr/bin/env bash
# ./run.sh          sets up .venv and runs the demo
# ./run.sh test     sets up .venv and runs the tests
# ./run.sh paper    sets up .venv and runs Table 1 of the paper on GPUS (default 4) GPUs; start it again to go on
# Further arguments of the first two go to dskd_ga.py and pytest.
set -euo pipefail
cd "$(dirname "$0")"

if ! cmp -s requirements.txt .venv/installed.txt; then
    "${PYTHON:-python3}" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt .venv/installed.txt
fi

job=${1:-demo}
shift || true
case $job in
    demo) exec .venv/bin/python dskd_ga.py --demo "$@" ;;
    test) exec .venv/bin/python -m pytest -q test_dskd_ga.py "$@" ;;
    paper)
        row() { .venv/bin/torchrun --standalone --nproc_per_node="${GPUS:-4}" dskd_ga.py "$@"; }
        row --eval-only openai-community/gpt2 --name untrained
        row --method sft
        row --div srkl
        row --method clp
        row --method cla
        row --div skl --ga
        row --div kl
        row --div kl --ga
        row --eval-only runs/teacher/best --name teacher ;;
    *) echo "run.sh: found $job, expected demo, test or paper" >&2; exit 2 ;;
esac
